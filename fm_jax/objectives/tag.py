"""Token-classification losses.

Batch fields: labels [B, T], weights [B, T] (0 for padding, special tokens and all but a word's first subword token;
`labels` may hold anything there), and the model's inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.types import Batch, Loss, LossFn, Params


def tag(apply: Callable[..., Any], inputs: tuple[str, ...] = ("tokens", "length")) -> LossFn:
    """Make the cross-entropy of `apply(variables, *inputs, rngs=…) -> logits [B, T, C]`.

    Returns:
        LossFn with the metrics "nll" and "accuracy", both per weighted token.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        logits, weights = _run(apply, inputs, params, batch, rng)
        labels = jnp.where(weights > 0, batch["labels"], 0)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return _sums(nll, logits.argmax(axis=-1) == labels, weights)

    return loss


def replaced(apply: Callable[..., Any], inputs: tuple[str, ...] = ("tokens", "length")) -> LossFn:
    """Make the loss of a discriminator, `apply(…) -> logits [B, T, 1]`: labels are 1 where a token was replaced.

    The binary cross-entropy of every weighted token (Clark et al. 2020, section 2).

    Returns:
        LossFn with the metrics "nll" and "accuracy", both per weighted token.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        logits, weights = _run(apply, inputs, params, batch, rng)
        logits, labels = logits[..., 0], batch["labels"] > 0
        nll = jax.nn.softplus(jnp.where(labels, -logits, logits))
        return _sums(nll, (logits > 0) == labels, weights)

    return loss


def _run(
    apply: Callable[..., Any], inputs: tuple[str, ...], params: Params, batch: Batch, rng: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    rngs = None if rng is None else {"dropout": rng}
    logits = apply({"params": params}, *(batch[name] for name in inputs), rngs=rngs)
    return logits.astype(jnp.float32), batch["weights"].astype(jnp.float32)


def _sums(nll: jax.Array, right: jax.Array, weights: jax.Array) -> Loss:
    total, weight = (nll * weights).sum(), weights.sum()
    return Loss(total, weight, {"nll": (total, weight), "accuracy": ((right * weights).sum(), weight)})
