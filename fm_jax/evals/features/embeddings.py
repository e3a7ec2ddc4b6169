"""Features of a whole split with labels and names: computed once, then probed, compared or saved.

Legend: N images, D features.
"""

import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.core.types import Batch
from fm_jax.evals import runner


@dataclass(frozen=True)
class Embeddings:
    """Features float32 [N, D], labels [N] and, if given, names [N]."""

    features: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse inconsistent shapes and non-finite features."""
        shape, count = self.features.shape, len(self.labels)
        if len(shape) != 2 or self.labels.shape != (shape[0],) or not self.features.size:
            raise DataError(f"features {shape} and labels {self.labels.shape} must be [N, D] and [N], N and D above 0")
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise DataError(f"labels must be integers, not {self.labels.dtype}")
        if self.ids is not None and self.ids.shape != (count,):
            raise DataError(f"{count} features have ids of shape {self.ids.shape}; give one id per feature")
        if (wrong := np.flatnonzero(~np.isfinite(self.features).all(axis=1))).size:
            raise DataError(f"features of row {wrong[0]} (and of {wrong.size - 1} more rows) are not finite")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Embeddings":
        """Return these rows [n], in this order."""
        rows = np.asarray(rows, np.int64)
        return Embeddings(self.features[rows], self.labels[rows], None if self.ids is None else self.ids[rows])


def embed(
    apply_fn: Callable[[Any, Batch], jax.Array],
    params: Any,
    batches: Iterable[Batch],
    *,
    ids: Sequence[str] | None = None,
    label: str = "label",
) -> Embeddings:
    """Compute the features of all images in order, without rows of weight 0.

    Args:
        apply_fn: (params, batch) -> features [B, D]; a pure function, jitted here.
        params: first argument of `apply_fn`.
        batches: a finite iterable, such as a `data.loader.Epoch`.
        ids: names of all rows with weight above 0, in order.
        label: the batch's field with the classes.

    Raises:
        DataError: as `runner.predict`, a wrong number of names, or features that are not finite.
    """
    features, labels = runner.predict(apply_fn, params, batches, label=label)
    return Embeddings(features, labels, None if ids is None else np.asarray(ids, str))


def save(path: Path, embeddings: Embeddings) -> None:
    """Write "features", "labels" and, if given, "ids" to an .npz file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"features": embeddings.features, "labels": embeddings.labels}
    if embeddings.ids is not None:
        arrays["ids"] = embeddings.ids.astype(str)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes every keyword for `allow_pickle`
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> Embeddings:
    """Read a file written by `save`.

    Raises:
        DataError: the file is missing, or was not written by `save`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Embeddings(arrays["features"], arrays["labels"], arrays.get("ids"))
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read embeddings {path}: {error}") from error


def check_pair(train: Embeddings, test: Embeddings) -> None:
    """Refuse two sets of features of different dimensions.

    Raises:
        DataError: the dimensions D differ.
    """
    if train.features.shape[1] != test.features.shape[1]:
        raise DataError(
            f"features of {train.features.shape[1]} and of {test.features.shape[1]} dimensions cannot be compared; "
            "compute both with the same model"
        )


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Standardise features [n, D] by the mean and standard deviation of `train`; its constant features become 0.

    Returns float64 arrays: `train`, then the others.
    """
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    flat = std <= 1e-8 * (1 + abs(mean))
    return [np.where(flat, 0.0, (part - mean) / np.where(flat, 1.0, std)) for part in (train, *others)]
