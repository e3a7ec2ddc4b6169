"""Contrastive loss for sentence embeddings: pairs of texts with in-batch negatives.

Batch fields: tokens, length (the first text of each pair), other_tokens, other_length (the second), weights [B].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.types import Batch, Loss, LossFn, Params

FIRST, SECOND = ("tokens", "length"), ("other_tokens", "other_length")


def in_batch(
    apply: Callable[..., Any],
    first: tuple[str, ...] = FIRST,
    second: tuple[str, ...] = SECOND,
    *,
    scale: float = 20.0,
) -> LossFn:
    """Make the ranking loss with the other rows' second texts as negatives (Henderson et al. 2017, section 4.4).

    The cross-entropy of a text's own partner among all partners in the batch, with logits `scale` times the cosine.
    Rows of weight 0 are not used as negatives. Unlike other losses, this one depends on the batch size and on
    accumulation, because a row is compared with its batch.

    Args:
        apply: `apply(variables, *inputs, rngs=…) -> vectors [B, D]`.
        first: batch fields of the first texts.
        second: batch fields of the second texts.
        scale: inverse of the temperature.

    Returns:
        LossFn with the metrics "nll" and "accuracy" (the partner is nearest), both per weighted row.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        keys = (None, None) if rng is None else jax.random.split(rng)
        left, right = (
            unit(
                apply(
                    {"params": params}, *(batch[name] for name in names), rngs=None if key is None else {"dropout": key}
                )
            )
            for names, key in zip((first, second), keys, strict=True)
        )
        weights = batch["weights"].astype(jnp.float32)
        scores = jnp.where(weights[None] > 0, scale * left @ right.T, -1e30)
        rows = jnp.arange(scores.shape[0])
        nll = jnp.where(weights > 0, -jax.nn.log_softmax(scores)[rows, rows], 0.0)
        total, weight = (nll * weights).sum(), weights.sum()
        correct = ((scores.argmax(axis=-1) == rows) * weights).sum()
        return Loss(total, weight, {"nll": (total, weight), "accuracy": (correct, weight)})

    return loss


def unit(x: jax.Array) -> jax.Array:
    """Normalise vectors [..., D] to length 1, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
