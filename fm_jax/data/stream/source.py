"""What a stream reads: rows of one shape by random access, the same at every visit or drawn anew."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np


class Source(Protocol):
    """Rows of one shape by random access."""

    name: str  # for messages
    fingerprint: str  # changes with the rows
    limits: Mapping[str, int]  # field -> exclusive upper bound of its values (the lower bound is 0)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


@runtime_checkable
class Drawn(Protocol):
    """A source with random rows in training (augmentation, masking); `source[index]` is the fixed evaluation row."""

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one random row; every random choice uses `rng`."""
        ...


@runtime_checkable
class Staged(Protocol):
    """A source that changes in the course of training: the size of its images, or which augmentations it applies."""

    def at(self, step: int, seed: int) -> Source:
        """Return the source as batch `step` reads it; what it depends on is part of the fingerprint."""
        ...
