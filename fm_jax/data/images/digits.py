"""Handwritten digits: 1,797 images of 8 × 8 pixels in 17 grey levels, included in scikit-learn (UCI, Alpaydın 1998)."""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError

CLASSES = tuple("0123456789")
SPLITS = ("train", "validation", "test")
SHARES = (0.625, 0.125, 0.25)


@dataclass(frozen=True)
class Config:
    """The digits as the source of a run."""

    seed: int = 0  # of the division into splits

    def __post_init__(self) -> None:
        """Refuse a negative seed."""
        check_least(self, seed=0)


class Digits:
    """One split as (uint8 [8, 8, 3], digit). Equal images share a split; splits are stratified by class."""

    classes = CLASSES

    def __init__(self, split: str, seed: int = 0) -> None:
        if split not in SPLITS:
            raise DataError(f"the digits have no split {split!r}; choose {', '.join(SPLITS)}")
        images, labels = load()
        self.rows = rows(images, labels, seed)[SPLITS.index(split)]
        """Indices of this split's images among all 1,797."""
        self._images, self._labels = images[self.rows], labels[self.rows]
        self.name = f"digits/{split}"
        digest = hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()
        self.fingerprint = f"digits-{split}-{digest[:16]}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.repeat(self._images[index][..., None], 3, axis=2), int(self._labels[index])

    def id(self, index: int) -> str:
        """Return the image's index among all 1,797, as text."""
        return str(self.rows[index])


@cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Return all images, uint8 [1797, 8, 8] of 0 to 255, and digits, int32 [1797]; both are read-only.

    Raises:
        ConfigError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError('the digits need scikit-learn; install "fm_jax[quickstart]"') from error
    digits = load_digits()
    images, labels = np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int32)
    for array in (images, labels):
        array.setflags(write=False)
    return images, labels


def rows(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split images [N, 8, 8] into train, validation and test, stratified by class, equal images together.

    Returns:
        The ascending image indices of each split.
    """
    rng = np.random.default_rng(seed)
    splits: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(labels):
        same: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(labels == label):
            same.setdefault(images[row].tobytes(), []).append(int(row))
        groups = list(same.values())
        order = rng.permutation(len(groups))
        ends = np.rint(np.cumsum(SHARES) * len(groups)).astype(int)
        for split, start, end in zip(splits, [0, *ends], ends, strict=False):
            split += [row for group in order[start:end] for row in groups[group]]
    train, validation, test = (np.sort(np.array(split)) for split in splits)
    return train, validation, test
