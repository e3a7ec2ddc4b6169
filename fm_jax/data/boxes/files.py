"""Images in files with the objects in them: what the readers of COCO, Pascal VOC and YOLO folders have in common."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from fm_jax.core.errors import DataError, shown
from fm_jax.data.boxes.record import Faults, Limits, Objects, Record, Table
from fm_jax.data.images import image as images
from fm_jax.data.images.folder import SUFFIXES

IMAGES = SUFFIXES


class BoxFiles:
    """One split as (uint8 [H, W, 3], objects); annotations are in memory, an image is read when it is indexed."""

    def __init__(
        self,
        faults: Faults,
        classes: tuple[str, ...],
        records: Sequence[Record],
        files: Sequence[Path],
        *,
        upright: bool,
        limits: Limits,
    ) -> None:
        """Keep the records and the file of each.

        Args:
            faults: what was wrong with the annotations; its name is that of the split.
            classes: names of the classes.
            records: of the images that are there.
            files: of the images.
            upright: boxes belong to the image turned by its EXIF orientation; else to the image as it is stored,
                unless only the turned one has the size that is said of it.
            limits: what is refused.

        Raises:
            DataError: too much is unusable, or there are no images or no classes.
        """
        faults.settle(limits.max_bad)
        self.name, self.classes, self.faults = faults.name, classes, faults
        if not records or not classes:
            raise DataError(f"{self.name} has no {'images' if classes else 'classes'}")
        self._table, self._files = Table(_distinct(records, files)), [str(file) for file in files]
        self._upright, self._max_pixels = upright, limits.max_pixels
        told = hashlib.sha256("\0".join((*classes, self._table.digest())).encode()).hexdigest()
        self.fingerprint = f"boxes-{told[:16]}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Objects]:
        record, file = self.record(index), Path(self._files[index])
        pixels = images.decode(file, max_pixels=self._max_pixels, upright=self._upright)
        if pixels.shape[:2] != record.size:
            pixels = images.decode(file, max_pixels=self._max_pixels, upright=not self._upright)
        if pixels.shape[:2] != record.size:
            here, there = (" × ".join(map(str, size[:2])) for size in (pixels.shape, record.size))
            raise DataError(f"{file} has {here} pixels (height × width), but its annotations are for {there}")
        return pixels, record.objects

    def record(self, index: int) -> Record:
        """Return what is known of an image without its pixels."""
        return self._table[index]

    def id(self, index: int) -> str:
        """Return the image's file."""
        return self._files[index]


def _distinct(records: Sequence[Record], files: Sequence[Path]) -> Sequence[Record]:
    """Return the records; where two have one name, as in two folders, all are named by their paths, for the scorers."""
    if len({record.id for record in records}) == len(records):
        return records
    paths = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [replace(record, id=os.path.relpath(path, root)) for record, path in zip(records, paths, strict=True)]


def inside(folder: Path, name: str) -> Path | None:
    """Return the file of a name that an annotation gives; None if it leads out of the folder.

    Names written on Windows have backslashes.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    return None if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name else folder / path


def unique(classes: Sequence[str], where: object) -> tuple[str, ...]:
    """Return names of classes.

    Raises:
        DataError: two are equal, or one is empty.
    """
    for name in classes:
        if not name.strip():
            raise DataError(f"{where} has a class without a name; give each class one")
        if classes.count(name) > 1:
            raise DataError(f"{where} has two classes named {shown(name)}; give each class its own name")
    return tuple(classes)
