"""Named tensors that can be read in parts: the interface of every weights file, and the same for arrays in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

Index = tuple[slice, ...]


class Spec(NamedTuple):
    """Dtype and shape of a stored tensor."""

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
        """Return a part of a tensor, one slice an axis; in `out`, of its shape and dtype, if that is given."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Weights that are already in memory."""

    arrays: Mapping[str, np.ndarray]
    where: str = "the given arrays"

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return dtype and shape of every array."""
        return {name: Spec(np.dtype(array.dtype).name, array.shape) for name, array in self.arrays.items()}

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a copy of a part of an array: jax may keep the memory it is given."""
        if out is None:
            return self.arrays[name][index].copy()
        out[...] = self.arrays[name][index]
        return out
