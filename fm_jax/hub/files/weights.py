"""Named tensors that can be read in parts: what every kind of file is to a name table, and arrays in memory as one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

Index = tuple[slice, ...]


class Spec(NamedTuple):
    """What is known of a stored tensor without reading it."""

    dtype: str
    shape: tuple[int, ...]


class Weights(Protocol):
    """Named tensors that can be read in parts."""

    where: str  # for messages

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return dtype and shape of every tensor."""
        ...

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of a tensor, one slice an axis; in `out`, of its shape and dtype, where that is given."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Weights that are in memory already."""

    arrays: Mapping[str, np.ndarray]
    where: str = "the given arrays"

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return dtype and shape of every array."""
        return {name: Spec(np.dtype(array.dtype).name, array.shape) for name, array in self.arrays.items()}

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of an array, copied: jax may keep the memory it is given."""
        if out is None:
            return self.arrays[name][index].copy()
        out[...] = self.arrays[name][index]
        return out
