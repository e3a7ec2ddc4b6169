"""Extractive question-answering loss: the start and end of the answer in a text.

Batch fields: start and end [B] (first and last token of the answer; a position outside the row's `length` is ignored,
as in a window of a long paragraph that does not hold the answer), length [B], weights [B], and the model's inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.types import Batch, Loss, LossFn, Params


def span(apply: Callable[..., Any], inputs: tuple[str, ...] = ("tokens", "length", "types")) -> LossFn:
    """Make the loss of `apply(variables, *inputs, rngs=…) -> (start, end)`, logits [B, T] each.

    Half the cross-entropy of the start and half that of the end (Devlin et al. 2019, section 4.2).

    Returns:
        LossFn with the metrics "nll", per weighted row, and "exact", the share of rows with both ends correct.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        rngs = None if rng is None else {"dropout": rng}
        logits = apply({"params": params}, *(batch[name] for name in inputs), rngs=rngs)
        weights, exact = batch["weights"].astype(jnp.float32), 1.0
        total, weight = jnp.zeros(()), jnp.zeros(())
        for scores, name in zip(logits, ("start", "end"), strict=True):
            scores, place = scores.astype(jnp.float32), batch[name]
            there = (place >= 0) & (place < batch["length"])
            place = jnp.where(there, place, 0)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), place[:, None], axis=-1)[:, 0]
            total += 0.5 * (nll * weights * there).sum()
            weight += 0.5 * (weights * there).sum()
            exact *= there & (scores.argmax(axis=-1) == place)
        return Loss(total, weight, {"nll": (total, weight), "exact": ((exact * weights).sum(), weights.sum())})

    return loss
