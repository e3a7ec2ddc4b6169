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
            DataError: a folder that is missing, cannot be read, or holds itself by a link; a class without images, not
                named in UTF-8, or that `classes_from` lacks.
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
        more = "it must hold a folder a class, and data.splits names what is not called so"
        raise DataError(f"{folder} cannot be read: {error.strerror or error}; {more}") from error
    if not names:
        raise DataError(f"{folder} has no folders; it must hold a folder a class")
    for name in names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):  # how Python spells bytes that are no text
            raise DataError(f"{folder} has the class {name!a}, which is not UTF-8; rename it")
    return tuple(names)


def _files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield (path, bytes) of the images under a folder, sorted within each; of a link to nowhere 0 bytes."""
    try:
        status = os.stat(folder)
        if (here := (status.st_dev, status.st_ino)) in above:
            raise DataError(f"{folder} lies in itself, by a link; remove the link")
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        try:
            inside, size = entry.is_dir(), entry.stat().st_size
        except OSError:  # reading it will say why, and count it
            inside, size = False, 0
        if inside:
            yield from _files(Path(entry.path), (*above, here))
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path, size
