"""Objects of tensorflow-datasets (coco/2017, voc/2007, …), with images as `image.decode` decodes them.

Annotations are stored with the images, so they are checked when a row is read, not when the split is opened.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes.record import Faults, Found, Objects, Record
from fm_jax.data.catalogue import line, open_split
from fm_jax.data.images.image import MAX_PIXELS, decode


@dataclass(frozen=True)
class Config:
    """A data set of tensorflow-datasets as the source of a run."""

    name: str  # coco/2017, voc/2007, …
    slices: tuple[str, str, str] = ("train", "validation", "test")  # of the splits, in this order; such as train[:90%]
    download: bool = False  # let tensorflow-datasets download and prepare a missing data set

    def __post_init__(self) -> None:
        """Refuse an empty name."""
        if not self.name:
            raise ConfigError("name must be a data set of tensorflow-datasets, such as coco/2017, not empty")


class CatalogueBoxes:
    """One split as (uint8 [H, W, 3], objects)."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: Path,
        *,
        download: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_bad: float = 0.01,
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
        self._max_pixels, self._max_bad = max_pixels, max_bad
        self.name = f"{name}/{split}"
        self.fingerprint = f"boxes-{info.full_name}-{split}-{len(self._rows)}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Objects]:
        row = self._row(index)
        pixels = decode(bytes(row["image"]), max_pixels=self._max_pixels, name=f"record {index}", upright=False)
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
        """Return the objects of a record.

        Raises:
            DataError: a larger share than `max_bad` of its boxes cannot be used.
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
        faults.settle(self._max_bad)
        return objects
