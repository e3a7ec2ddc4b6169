"""Softmax classification loss.

Batch fields: label [B], weights [B] (0 for padding rows), and the model's inputs. For mixed images
(data/images/mixup.py) also target [B, C], the share of every class; label is then the largest one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.statistics import apply_with
from fm_jax.core.types import Batch, Loss, LossFn, Params


def softmax(
    apply: Callable[..., Any], inputs: tuple[str, ...] = ("tokens", "length"), *, label_smoothing: float = 0.0
) -> LossFn:
    """Make the cross-entropy loss of a classifier's `apply(variables, *inputs, rngs=…) -> logits [B, C]`.

    The target distribution is target [B, C] if the batch has it, else label [B].

    Returns:
        LossFn with the metrics "nll" (in nats, without smoothing) and "accuracy", both per weighted row.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        out, updates = apply_with(apply, params, *(batch[name] for name in inputs), rng=rng)
        logits = out.astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        if "target" in batch:
            likelihood = -(batch["target"].astype(jnp.float32) * log_p).sum(axis=-1)
        else:
            likelihood = -jnp.take_along_axis(log_p, batch["label"][:, None], axis=-1)[:, 0]
        objective = likelihood
        if label_smoothing:
            objective = (1 - label_smoothing) * likelihood - label_smoothing * log_p.mean(axis=-1)
        weights = batch["weights"].astype(jnp.float32)
        correct = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
        weight = weights.sum()
        metrics = {"nll": ((likelihood * weights).sum(), weight), "accuracy": ((correct * weights).sum(), weight)}
        return Loss((objective * weights).sum(), weight, metrics, updates)

    return loss
