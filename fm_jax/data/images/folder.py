"""Images in folders: root / split / class / files at any depth. Classes are numbered by sorted folder name.

The folder of a split may have another of the names in `files.CALLED`: `val` for validation.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data import files
from fm_jax.data.images.image import MAX_PIXELS, decode

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


@dataclass(frozen=True)
class Config:
    """Folders of images as the source of a run."""

    path: Path  # has one folder for each split, and each of those one for each class
    splits: tuple[str, str, str] = ("train", "validation", "test")  # of the splits' folders (see `files.folder_of`)


class ImageFolder:
    """One split as (uint8 [H, W, 3], class). Files are listed once; each image is read when it is indexed."""

    def __init__(
        self, root: Path, split: str = "train", *, classes_from: str = "", max_pixels: int = MAX_PIXELS
    ) -> None:
        """List the files of a split, sorted; hidden files and other suffixes are ignored.

        Args:
            root: the folder of the splits.
            split: name of the split's folder.
            classes_from: the split whose folders define the classes; by default this one.
            max_pixels: limit on an image's height × width.

        Raises:
            DataError: a folder is missing, unreadable, links to its own parent, or is there by two names; a class has
                no images, a name that is not UTF-8, or does not exist in `classes_from`.
        """
        self._root, self._max_pixels = files.folder_of(root, split), max_pixels
        first = files.folder_of(root, classes_from) if classes_from else self._root
        self.classes = _classes(first)
        here = self.classes if first == self._root else _classes(self._root)
        if unknown := sorted(set(here) - set(self.classes)):
            raise DataError(f"{self._root} has the class {unknown[0]!r}, which is missing in {first}")
        self.name = str(self._root)
        self._files: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256("/".join(self.classes).encode())
        for name in here:
            before = len(self._files)
            for file, size in files.walk(self._root / name, SUFFIXES):
                self._files.append(file[len(self.name) + 1 :])
                digest.update(f"{self._files[-1]}\0{size}\n".encode("utf-8", "surrogateescape"))
            if len(self._files) == before:
                raise DataError(f"{self._root / name} has no image files ({', '.join(SUFFIXES)})")
            labels += [self.classes.index(name)] * (len(self._files) - before)
        self._labels = np.array(labels, np.int32)
        self.fingerprint = f"folder-{split}-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self._root / self._files[index]
        return decode(path, max_pixels=self._max_pixels, name=self._files[index]), int(self._labels[index])

    def id(self, index: int) -> str:
        """Return the file's path within the split."""
        return self._files[index]


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        more = "it must contain one folder per class; if the splits have other names, set data.source.splits"
        raise DataError(f"cannot read {folder}: {error.strerror or error}; {more}") from error
    if not names:
        raise DataError(f"{folder} has no folders; it must contain one folder per class")
    for name in names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):  # surrogate escapes: bytes that are not UTF-8
            raise DataError(f"{folder} has the class {name!a}, which is not UTF-8; rename it")
    return tuple(names)
