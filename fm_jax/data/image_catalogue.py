"""Labelled images of tensorflow-datasets (imagenet2012, cifar10, cifar100, …), decoded by our own rules."""

from pathlib import Path

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.catalogue import line, open_split
from fm_jax.data.image import MAX_PIXELS, decode


class CatalogueImages:
    """One split, as pictures: (uint8 [H, W, 3], class)."""

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
            DataError: as `catalogue.open_split`, or a field that holds no class.
        """
        fields = (image, label)
        info, self._rows = open_split(name, split, data_dir, fields=fields, download=download, encoded=(image,))
        names = getattr(info.features[label], "names", None)
        if not names:
            raise DataError(f"field {label!r} of {name} has no names of classes; name one that has")
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
            raise DataError(f"record {index} cannot be read: {line(error)}") from error
        found = decode(bytes(row[self._image]), max_pixels=self._max_pixels, name=f"record {index}")
        return found, int(row[self._label])

    def id(self, index: int) -> str:
        """Return the record's number."""
        return str(index)
