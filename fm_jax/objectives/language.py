"""Next-token prediction loss, exact under padding and packing.

Batch fields: tokens [B, T], targets [B, T] (already shifted by the data pipeline), weights [B, T], and for packed
documents positions [B, T] and segments [B, T].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.types import Batch, Loss, LossFn, Params


def next_token(
    apply: Callable[..., Any], *, z_loss: float = 0.0, label_smoothing: float = 0.0, chunk: int = 0
) -> LossFn:
    """Make the language-modelling loss of a decoder's `apply`.

    Args:
        apply: `model.apply`, with the methods "hidden" and "logits".
        z_loss: weight of log(Z)², which keeps the softmax's normaliser Z near 1 (Chowdhery et al. 2022, section 5).
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk: number of tokens whose logits are computed at a time; 0 for all at once. With chunks no [tokens, V]
            array exists, forward or backward: the logits of a chunk are recomputed for its gradient.

    Returns:
        LossFn with the metrics "nll" (the plain negative log-likelihood in nats, without z-loss and smoothing)
        and "accuracy", both per weighted token.
    """
    fields = ("positions", "segments")
    return target_tokens(apply, fields, z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk)


def target_tokens(
    apply: Callable[..., Any], fields: tuple[str, ...], *, z_loss: float, label_smoothing: float, chunk: int
) -> LossFn:
    """Make the loss of the batch's targets [B, T], predicted from its tokens [B, T] and further fields.

    Args:
        apply: as for `next_token`.
        fields: batch fields passed to "hidden" as keyword arguments, if the batch has them.
        z_loss: as for `next_token`.
        label_smoothing: as for `next_token`.
        chunk: as for `next_token`.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        variables, rngs = {"params": params}, None if rng is None else {"dropout": rng}
        given = {name: batch[name] for name in fields if name in batch}
        hidden = apply(variables, batch["tokens"], **given, rngs=rngs, method="hidden")
        weights = batch["weights"].astype(jnp.float32)

        def score(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            logits = apply(variables, hidden, method="logits")
            return _score(logits, targets, weights, z_loss=z_loss, label_smoothing=label_smoothing)

        if chunk:
            sums = _in_chunks(score, chunk, hidden, batch["targets"], weights)
        else:
            sums = score(hidden, batch["targets"], weights)
        total, weight = sums[0], weights.sum()
        return Loss(total, weight, {"nll": (sums[1], weight), "accuracy": (sums[2], weight)})

    return loss


def _score(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, *, z_loss: float, label_smoothing: float
) -> jax.Array:
    """Return the weighted sums [3] of (objective, negative log-likelihood, correct); logits [..., V], others [...]."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    likelihood = log_z - picked
    objective = likelihood
    if label_smoothing:
        objective = (1 - label_smoothing) * likelihood + label_smoothing * (log_z - logits.mean(axis=-1))
    if z_loss:
        objective = objective + z_loss * jnp.square(log_z)
    # equal to argmax == target except at exact ties, and without the argmax's second pass over the vocabulary
    correct = (picked >= logits.max(axis=-1)).astype(jnp.float32)
    return jnp.stack([(value * weights).sum() for value in (objective, likelihood, correct)])


def _in_chunks(
    score: Callable[..., jax.Array], chunk: int, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum `score` [3] over chunks of tokens, padding the last one; hidden [B, T, D], the others [B, T]."""
    tokens = targets.size
    size = min(chunk, tokens)
    pad = -tokens % size
    flat = (hidden.reshape(tokens, -1), targets.reshape(tokens), weights.reshape(tokens))
    parts = [jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]) for x in flat]

    @jax.checkpoint
    def step(sums: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return sums + score(*part), None

    sums, _ = jax.lax.scan(step, jnp.zeros(3), tuple(parts))
    return sums
