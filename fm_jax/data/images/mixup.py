"""Mixup and CutMix: mix two images of a batch, and their targets in the same proportion.

Rows 2k and 2k + 1 of the global batch are mixed with each other; the shuffle makes them a random pair. The random
numbers of a pair depend on the seed and its place in the endless order, not on hosts or workers.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream.loader import Batches, HostBatch


@dataclass(frozen=True)
class Mix:
    """Mixup and CutMix settings; the defaults are those of DeiT (table 9 and main.py) and MAE's finetuning."""

    mixup: float = 0.8  # mixup's α of Beta(α, α); 0: no mixup (Zhang et al. 2017)
    cutmix: float = 1.0  # CutMix's α of Beta(α, α); 0: no CutMix (Yun et al. 2019)
    switch: float = 0.5  # probability of CutMix rather than mixup, if both are above 0
    probability: float = 1.0  # probability that a pair is mixed at all

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if not (min(self.mixup, self.cutmix) >= 0 and 0 <= self.switch <= 1 and 0 <= self.probability <= 1):
            raise ConfigError(f"mixup and cutmix must be at least 0, switch and probability in 0 to 1: {self}")
        if not self.mixup and not self.cutmix:
            raise ConfigError("mixup and cutmix are both 0; set the whole section to none instead")


def mixed(batch: HostBatch, mix: Mix, num_classes: int, *, seed: int, first: int = 0) -> HostBatch:
    """Return a batch with mixed "image", soft "target" [B, C] float32, and "label" [B], the class of the larger part.

    Args:
        batch: "image" [B, H, W, 3], normalised, "label" [B], and any other fields, which are kept.
        mix: the settings.
        num_classes: C.
        seed: the run's seed.
        first: index of the batch's first row in the endless order.

    Raises:
        DataError: an odd number of rows, or labels out of range.
    """
    labels, images = batch["label"], batch["image"].copy()
    if len(labels) % 2 or first % 2:
        raise DataError(f"images are mixed in pairs: {len(labels)} rows from row {first} must both be even")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"labels are {labels.min()} to {labels.max()}, outside 0 … {num_classes - 1}")
    target = np.eye(num_classes, dtype=np.float32)[labels]
    for row in range(0, len(labels), 2):
        rng = np.random.default_rng((seed % 2**32, 1, (first + row) // 2))
        if rng.random() >= mix.probability:
            continue
        pair, swapped = slice(row, row + 2), images[row : row + 2][::-1].copy()
        if mix.cutmix and (not mix.mixup or rng.random() < mix.switch):
            rows, columns = _box(rng, rng.beta(mix.cutmix, mix.cutmix), *images.shape[1:3])
            images[pair, rows, columns] = swapped[:, rows, columns]
            lost = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = np.float32(1 - lost / math.prod(images.shape[1:3]))
        else:
            share = np.float32(rng.beta(mix.mixup, mix.mixup))
            images[pair] = share * images[pair] + (1 - share) * swapped
        target[pair] = share * target[pair] + (1 - share) * target[pair][::-1]
    label = np.where(target[np.arange(len(labels)), labels] >= 0.5, labels, target.argmax(1)).astype(labels.dtype)
    return {**batch, "image": images, "target": target, "label": label}


@dataclass(frozen=True)
class Mixed:
    """`Batches` with mixed images; the training loop accepts it in place of `Batches`."""

    batches: Batches
    mix: Mix
    num_classes: int

    def __post_init__(self) -> None:
        """Refuse a batch whose pairs would be split between hosts."""
        if (self.batches.batch_size // self.batches.hosts) % 2:
            size, hosts = self.batches.batch_size, self.batches.hosts
            raise ConfigError(
                f"images are mixed in pairs: batch_size {size} over {hosts} hosts gives an odd number of rows; "
                "choose a batch_size that gives an even number"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the stream: the batches' fingerprint and the mixing."""
        return hashlib.sha256(f"{self.batches.fingerprint}/{self.mix}".encode()).hexdigest()[:16]

    def state(self, next_batch: int) -> dict[str, Any]:
        """Return the stream's state for a checkpoint."""
        return {"next_batch": next_batch, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """Return the index of the next batch from a checkpoint's state.

        Raises:
            DataError: the state belongs to another stream.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the checkpoint was made with data stream {state.get('fingerprint')}, this is {self.fingerprint}; "
                "data, batch_size, seed and mixing must be the same to resume"
            )
        return int(state["next_batch"])

    def iterate(self, start: int = 0) -> Iterator[HostBatch]:
        """Yield this host's rows of global batches start, start + 1, … without end."""
        size, rows = self.batches.batch_size, self.batches.batch_size // self.batches.hosts
        reader = self.batches.iterate(start)
        try:
            for step, batch in enumerate(reader, start):
                first = step * size + self.batches.host * rows
                yield mixed(batch, self.mix, self.num_classes, seed=self.batches.seed, first=first)
        finally:
            reader.close()  # type: ignore[attr-defined]  # a generator: its readers end here


def _box(rng: np.random.Generator, share: float, height: int, width: int) -> tuple[slice, slice]:
    """Return rows and columns of a rectangle with 1 - share of the area, centred uniformly and clipped at the edges."""
    cut = math.sqrt(1 - share)
    y, x = rng.integers(0, height), rng.integers(0, width)
    half = int(height * cut) // 2, int(width * cut) // 2
    rows = slice(max(0, int(y) - half[0]), min(height, int(y) + half[0]))
    columns = slice(max(0, int(x) - half[1]), min(width, int(x) + half[1]))
    return rows, columns
