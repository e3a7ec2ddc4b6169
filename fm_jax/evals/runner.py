"""Evaluate on whole sets: sums and weights add up in float64 on the host, and are divided once at the end.

So a padded last batch, an uneven one, or a batch of long texts among short ones counts for exactly what it holds; a
mean of the batches' means would not.

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
    """Compile a loss into a step without dropout that returns {"loss": (sum, weight), **metrics}.

    With `combine` the step's first argument is a pair (trained, frozen) instead of one tree, and the loss sees
    `combine(trained, frozen)`: the same one that the training step was made with.

    Raises:
        ConfigError: when first called, where the loss has a metric that is itself called "loss".
    """

    def step(params: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        whole = params if combine is None else combine(*params)
        loss = loss_fn(whole, batch, None, None)
        if "loss" in loss.metrics:
            raise ConfigError('the loss function returns a metric named "loss"; that name is taken by the loss itself')
        return {"loss": (loss.sum, loss.weight), **loss.metrics}

    return jax.jit(step)


def totals(step: EvalStep, params: Any, batches: Iterable[Batch]) -> dict[str, tuple[float, float]]:
    """Add up (sum, weight) of every name over finitely many batches; {} for no batches.

    The next batch is read while the device computes, and never are two steps in flight.
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

    A metric whose whole weight is 0 (it saw nothing it measures) is NaN.

    Args:
        step: from `make_eval_step`.
        params: what the step takes: a tree, or (trained, frozen).
        batches: every batch once; end an endless loader with `itertools.islice`.

    Raises:
        DataError: no batches, or a loss of weight 0 over all of them.
    """
    pairs = totals(step, params, batches)
    if not pairs:
        raise DataError("there is no batch to evaluate on; is the split empty, or smaller than one batch?")
    if "loss" in pairs and pairs["loss"][1] == 0:
        raise DataError("the loss has weight 0 over all evaluation batches; are all examples padding?")
    return {name: total / weight if weight else math.nan for name, (total, weight) in pairs.items()}


def predict(
    apply_fn: Callable[[Any, Batch], jax.Array],
    params: Any,
    batches: Iterable[Batch],
    *,
    label: str = "label",
    weight: str = "weights",
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, C] float32 and labels [N] of all examples in order, without the rows of weight 0.

    Args:
        apply_fn: (params, batch) -> logits [B, C]; pure, compiled here.
        params: first argument of `apply_fn`.
        batches: finitely many; global arrays of several hosts come back whole on every one.
        label: the batch's field [B] of integers.
        weight: the field [B] that is 0 on padding; a batch without it has none.

    Raises:
        DataError: no examples, a field that is missing or of another shape, or logits that are not [B, C].
    """
    compiled = jax.jit(apply_fn)
    logits, labels = [], []
    for number, batch in enumerate(batches):
        if label not in batch:
            raise DataError(f"batch {number} has no field {label!r}; it has {', '.join(batch)}")
        out = compiled(params, batch)
        truth = whole(batch[label])
        keep = whole(batch[weight]) > 0 if weight in batch else np.ones(truth.shape, bool)
        if out.ndim != 2 or truth.shape != out.shape[:1] or keep.shape != truth.shape:
            raise DataError(
                f"batch {number}: logits {out.shape}, {label} {truth.shape} and {weight} {keep.shape} must be "
                "[B, C], [B] and [B]"
            )
        logits.append(whole(out).astype(np.float32)[keep])
        labels.append(truth[keep])
    if not any(len(part) for part in labels):
        raise DataError("there is no example to predict; is the split empty, or all of it padding?")
    return np.concatenate(logits), np.concatenate(labels)


def whole(array: Any) -> np.ndarray:
    """Return an array on this host, gathered from the others where they hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
