"""Evaluate on whole data sets: sums and weights add up in float64 on the host and are divided once at the end.

A padded or uneven batch, or a batch of long texts among short ones, thus counts with its exact weight; in a mean of
batch means it would not.

Legend: B batch, N examples, C classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.types import Batch, LossFn, Params

EvalStep = Callable[[Any, Batch], Mapping[str, tuple[Any, Any]]]
"""(params, batch) -> {name: (sum, weight)}."""


def make_eval_step(loss_fn: LossFn, combine: Callable[[Params, Params], Params] | None = None) -> EvalStep:
    """Compile a loss into an evaluation step without dropout that returns {"loss": (sum, weight), **metrics}.

    With `combine`, the step's first argument is a pair (trained, frozen) instead of one tree, and the loss sees
    `combine(trained, frozen)`. Give the `combine` of the training step.

    Raises:
        ConfigError: on the first call, if the loss has a metric named "loss".
    """

    def step(params: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        whole = params if combine is None else combine(*params)
        loss = loss_fn(whole, batch, None, None)
        if "loss" in loss.metrics:
            raise ConfigError('the loss function returns a metric named "loss", which is the loss itself; rename it')
        return {"loss": (loss.sum, loss.weight), **loss.metrics}

    return jax.jit(step)


def totals(step: EvalStep, params: Any, batches: Iterable[Batch]) -> dict[str, tuple[float, float]]:
    """Add up (sum, weight) of every name over finitely many batches; {} for no batches.

    The next batch is read while the device computes; at most one step is in flight.
    """
    sums: dict[str, np.ndarray] = {}
    running: Mapping[str, tuple[Any, Any]] = {}

    def collect() -> None:
        for name, pair in jax.device_get(dict(running)).items():
            sums[name] = sums.get(name, np.zeros(2)) + np.array([np.float64(part) for part in pair])

    for batch in batches:
        collect()  # waits for the step before this one
        running = step(params, batch)
    collect()
    return {name: (float(pair[0]), float(pair[1])) for name, pair in sums.items()}


def evaluate(step: EvalStep, params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the weighted mean of the loss and of every metric over finitely many batches.

    A metric of total weight 0 is NaN.

    Args:
        step: the result of `make_eval_step`.
        params: the step's first argument: a tree, or (trained, frozen).
        batches: every batch once; limit an endless loader with `itertools.islice`.

    Raises:
        DataError: no batches, or a loss of total weight 0.
    """
    pairs = totals(step, params, batches)
    if not pairs:
        raise DataError("there are no batches to evaluate; check that the split is not empty")
    if "loss" in pairs and pairs["loss"][1] == 0:
        raise DataError("the loss has weight 0 over all evaluation batches; check that not all examples are padding")
    return {name: total / weight if weight else math.nan for name, (total, weight) in pairs.items()}


def predict(
    apply_fn: Callable[[Any, Batch], jax.Array],
    params: Any,
    batches: Iterable[Batch],
    *,
    label: str = "label",
    weight: str = "weights",
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits float32 [N, C] and labels [N] of all examples in order, without rows of weight 0.

    Args:
        apply_fn: (params, batch) -> logits [B, C]; a pure function, jitted here.
        params: first argument of `apply_fn`.
        batches: a finite iterable; every host gets the results of all hosts.
        label: the batch's field of integer labels [B].
        weight: the batch's field [B] that is 0 on padding; a batch without it has no padding.

    Raises:
        DataError: no examples, a missing field, or inconsistent shapes.
    """
    compiled = jax.jit(apply_fn)
    logits, labels = [], []
    for number, batch in enumerate(batches):
        if label not in batch:
            raise DataError(f"batch {number} has no field {label!r}; it has {', '.join(batch)}")
        out = compiled(params, batch)
        truth = gather(batch[label])
        keep = gather(batch[weight]) > 0 if weight in batch else np.ones(truth.shape, bool)
        if out.ndim != 2 or truth.shape != out.shape[:1] or keep.shape != truth.shape:
            raise DataError(
                f"batch {number}: logits {out.shape}, {label} {truth.shape} and {weight} {keep.shape} must be "
                "[B, C], [B] and [B]"
            )
        logits.append(gather(out).astype(np.float32)[keep])
        labels.append(truth[keep])
    if not any(len(part) for part in labels):
        raise DataError("there are no examples to predict; check that the split is not empty or all padding")
    return np.concatenate(logits), np.concatenate(labels)


def gather(array: Any) -> np.ndarray:
    """Return the whole array (same shape) as NumPy, gathered from other hosts if they hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
