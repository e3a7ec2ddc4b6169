"""Labelled images of tensorflow-datasets (imagenet2012, cifar10, cifar100, …), decoded by `image.decode`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.catalogue import line, open_split
from fm_jax.data.images.image import MAX_PIXELS, decode


@dataclass(frozen=True)
class Config:
    """A data set of tensorflow-datasets as the source of a run."""

    name: str  # imagenet2012, cifar10, …
    slices: tuple[str, str, str] = ("train", "validation", "test")  # of the splits, in this order; such as train[:90%]
    download: bool = False  # let tensorflow-datasets download and prepare a missing data set

    def __post_init__(self) -> None:
        """Refuse an empty name."""
        if not self.name:
            raise ConfigError("name must be a data set of tensorflow-datasets, such as cifar10, not empty")


class CatalogueImages:
    """One split as (uint8 [H, W, 3], class)."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: Path,
        *,
        image: str = "image",
        label: str = "label",
        download: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Open a split; `image` and `label` name the fields.

        Raises:
            DataError: as `catalogue.open_split`, or the label field is not a class.
        """
        fields = (image, label)
        info, self._rows = open_split(name, split, data_dir, fields=fields, download=download, encoded=(image,))
        names = getattr(info.features[label], "names", None)
        if not names:
            raise DataError(f"field {label!r} of {name} has no class names; choose a field that has them")
        self.classes = tuple(names)
        self._image, self._label, self._max_pixels = image, label, max_pixels
        self.name = f"{name}/{split}"
        self.fingerprint = f"{info.full_name}-{split}-{image}-{label}-{len(self._rows)}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            row = self._rows[index]
        except IndexError:
            raise
        except Exception as error:  # a damaged file: the reader raises RuntimeError with C++ text
            raise DataError(f"cannot read record {index}: {line(error)}") from error
        pixels = decode(bytes(row[self._image]), max_pixels=self._max_pixels, name=f"record {index}")
        return pixels, int(row[self._label])

    def id(self, index: int) -> str:
        """Return the record's index, as text."""
        return str(index)
