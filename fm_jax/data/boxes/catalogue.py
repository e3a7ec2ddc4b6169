"""Objects of tensorflow-datasets (voc/2007, coco/2017:1.1.0, …), with images as `image.decode` decodes them.

Annotations are stored with the images, so they are checked when a row is read, not when the split is opened. The
builder of coco needs TensorFlow: prepare the set where that is installed (as ArrayRecord), copy it here and name it
with its version, and it is read without. COCO's own files need none of this (`coco.py`).
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes.record import Faults, Found, Limits, Objects, Record
from fm_jax.data.catalogue import line, open_split
from fm_jax.data.images.image import decode

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """A data set of tensorflow-datasets as the source of a run."""

    name: str  # voc/2007, coco/2017:1.1.0, …
    slices: tuple[str, str, str] = ("train", "validation", "test")  # of the splits, in this order; such as train[:90%]
    download: bool = False  # let tensorflow-datasets download and prepare a missing data set

    def __post_init__(self) -> None:
        """Refuse an empty name."""
        if not self.name:
            raise ConfigError("name must be a data set of tensorflow-datasets, such as voc/2007, not empty")


class CatalogueBoxes:
    """One split as (uint8 [H, W, 3], objects)."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: Path,
        *,
        download: bool = False,
        limits: Limits,
    ) -> None:
        """Open a split whose records have "image" and "objects" with "bbox" and "label".

        Raises:
            DataError: as `catalogue.open_split`, or the objects have no boxes or no class names.
        """
        fields = ("image", "objects")
        info, self._rows = open_split(name, split, data_dir, fields=fields, download=download, encoded=("image",))
        try:
            feature = info.features["objects"]
            names, _ = feature["label"].names, feature["bbox"]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the objects of {name} have no bbox, or no label with class names") from error
        self.classes = tuple(names)
        # Its builder divides Pascal VOC's corners by the sides as they are: left and top count from 1.
        self._first = 1.0 if name.split("/")[0].split(":")[0] == "voc" else 0.0
        self._limits, self._lost = limits, dict[int, str]()
        self.name = f"{name}/{split}"
        self.fingerprint = f"boxes-{info.full_name}-{split}-{len(self._rows)}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Objects]:
        row = self._row(index)
        pixels = decode(bytes(row["image"]), max_pixels=self._limits.max_pixels, name=f"record {index}", upright=False)
        height, width = pixels.shape[:2]
        return pixels, self._objects(index, row["objects"], (height, width))

    def record(self, index: int) -> Record:
        """Return what is known of an image, which is decoded for its size."""
        pixels, objects = self[index]
        return Record(self._id(index), (int(pixels.shape[0]), int(pixels.shape[1])), objects)

    def id(self, index: int) -> str:
        """Return the image's number or name in the data set, as text; without one, the record's index."""
        return str(self._id(index))

    def _id(self, index: int) -> int | str:
        row = self._row(index)
        if "image/id" in row:
            return int(row["image/id"])
        name = row.get("image/filename", index)
        return name.decode("utf-8", "replace") if isinstance(name, bytes) else int(name) if name is index else str(name)

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self._rows[index]
        except IndexError:
            raise
        except Exception as error:  # a damaged file: the reader raises RuntimeError with C++ text
            raise DataError(f"cannot read record {index}: {line(error)}") from error
        return row

    def _objects(self, index: int, given: dict[str, Any], size: tuple[int, int]) -> Objects:
        """Return the objects of a record, without those that cannot be used.

        Raises:
            DataError: that concerns a larger share of the records than `max_bad`.
        """
        top, left, bottom, right = np.asarray(given["bbox"], np.float64).reshape(-1, 4).T
        height, width = size
        corners = np.stack([left * width - self._first, top * height - self._first, right * width, bottom * height], 1)
        count = len(corners)
        area = np.asarray(given.get("area", np.full(count, np.nan)), np.float64)
        crowd, difficult = (np.asarray(given.get(k, np.zeros(count)), bool) for k in ("is_crowd", "is_difficult"))
        faults = Faults(f"{self.name}, record {index}")
        columns = zip(corners.tolist(), given["label"], area.tolist(), crowd.tolist(), difficult.tolist(), strict=True)
        found = [Found(f"object {i}", box, int(label), *rest) for i, (box, label, *rest) in enumerate(columns)]
        objects = faults.objects(found, size, len(self.classes))
        if lost := faults.summary("boxes"):
            self._count(index, lost)
        return objects

    def _count(self, index: int, lost: str) -> None:
        if index in self._lost:
            return
        self._lost[index] = lost
        seen, total = len(self._lost), len(self)
        if seen > self._limits.max_bad * total:
            first = "; ".join(list(self._lost.values())[:3])
            raise DataError(
                f"{seen} of {total} records have boxes that cannot be used, more than max_bad "
                f"{self._limits.max_bad:g} allows; first: {first}"
            )
        if seen & (seen - 1) == 0:  # 1, 2, 4, 8, …
            _log.warning("%s, and are left out; %d such records so far", lost, seen)
