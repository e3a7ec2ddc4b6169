"""Images in folders: root / split / class / any depth of files. The folders' names, sorted, number the classes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.image import MAX_PIXELS, decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


class ImageFolder:
    """One split, as pictures: (uint8 [H, W, 3], class). The folder is read once, its images when they are asked for."""

    def __init__(
        self, root: Path, split: str = "train", *, classes_from: str = "", max_pixels: int = MAX_PIXELS
    ) -> None:
        """List the files of a split, in sorted order; hidden ones, and those with another suffix, do not count.

        Args:
            root: the folder of the splits.
            split: name of one's folder.
            classes_from: the split whose folders number the classes; by default this one.
            max_pixels: of an image.

        Raises:
            DataError: a missing folder, a class without images, or one that `classes_from` lacks.
        """
        self.classes = _classes(root / (classes_from or split))
        here = self.classes if classes_from in ("", split) else _classes(root / split)
        if unknown := sorted(set(here) - set(self.classes)):
            raise DataError(f"{root / split} has the class {unknown[0]!r}, which {root / classes_from} lacks")
        self._root, self._max_pixels = root / split, max_pixels
        self.name = str(self._root)
        self._files: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256("/".join(self.classes).encode())
        for name in here:
            before = len(self._files)
            for file, size in _files(self._root / name):
                self._files.append(file[len(self.name) + 1 :])
                digest.update(f"{self._files[-1]}\0{size}\n".encode("utf-8", "surrogateescape"))
            if len(self._files) == before:
                raise DataError(f"{self._root / name} holds no image ({', '.join(SUFFIXES)})")
            labels += [self.classes.index(name)] * (len(self._files) - before)
        self._labels = np.array(labels, np.int32)
        self.fingerprint = f"folder-{split}-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self._root / self._files[index]
        return decode(path, max_pixels=self._max_pixels, name=self._files[index]), int(self._labels[index])

    def id(self, index: int) -> str:
        """Return a file's path within the split."""
        return self._files[index]


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}; it must hold a folder a class") from error
    if not names:
        raise DataError(f"{folder} has no folders; it must hold a folder a class")
    return tuple(names)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (path, bytes) of the images under a folder, sorted within each."""
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path, entry.stat().st_size
