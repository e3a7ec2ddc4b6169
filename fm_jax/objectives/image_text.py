"""Losses of pairs of an image and a text: CLIP's softmax over the batch, and SigLIP's sigmoid of every pair.

Batch fields: image [B, H, W, C], tokens [B, T], weights [B] (0 for padding rows).

A batch may hold one caption several times. Both losses then ask for what cannot be: over the n rows of a caption that
stands n times, the mean of CLIP's loss is at least ln n.

Dims: B pairs, P width of the vectors.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.statistics import apply_with
from fm_jax.core.types import Batch, Loss, LossFn, Params
from fm_jax.objectives.contrastive import compare, total

FIELDS = ("image", "tokens")
_FAR = -1e30  # a logit of no probability


def logits(embedded: Any) -> jax.Array:
    """Return the logits [A, B] of images against texts: the cosine times the scale, plus the bias.

    Args:
        embedded: `image` [A, P] and `text` [B, P] of length 1, `scale` [] and `bias` [].
    """
    return compare(embedded.image, embedded.text) * embedded.scale + embedded.bias


def softmax(apply: Callable[..., Any], inputs: tuple[str, ...] = FIELDS) -> LossFn:
    """Make CLIP's loss: the mean of two cross-entropies, of an image's text among all texts and the reverse.

    Under `jit` the batch is the global one on any number of devices: every image is compared with the texts of all
    devices, and gradients flow to them. With accumulation a pair is compared only with those of its own microbatch, and
    under pmap only with those of its own replica. Rows of weight 0 are neither compared nor compared with.
    Source: Radford et al. 2021, figure 3.

    Args:
        apply: `apply(variables, image, tokens, …)` -> what `logits` reads.
        inputs: batch fields of the model's inputs.

    Returns:
        LossFn with the metrics "image_nll", "text_nll" (the two cross-entropies), "image_accuracy", "text_accuracy"
        (an image's text is the nearest, and the reverse), "similarity" (cosine of a pair), and "scale".
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        embedded, updates = apply_with(apply, params, *(batch[name] for name in inputs), rng=rng)
        weights = batch["weights"].astype(jnp.float32)
        there, scores = weights > 0, logits(embedded)
        of_image = jax.nn.log_softmax(jnp.where(there[None], scores, _FAR), axis=1)
        of_text = jax.nn.log_softmax(jnp.where(there[:, None], scores, _FAR), axis=0)
        own = jnp.arange(len(scores))
        measured = {
            "image_nll": -jnp.diagonal(of_image),
            "text_nll": -jnp.diagonal(of_text),
            "image_accuracy": of_image.argmax(axis=1) == own,
            "text_accuracy": of_text.argmax(axis=0) == own,
        }
        return _loss((measured["image_nll"] + measured["text_nll"]) / 2, measured, embedded, weights, updates)

    return loss


def sigmoid(apply: Callable[..., Any], inputs: tuple[str, ...] = FIELDS) -> LossFn:
    """Make SigLIP's loss: minus the log-probability that each pair is judged rightly, summed over an image's texts.

    The probability that image i and text j belong together is the sigmoid of their logit; they do if i = j. The sum
    over the texts is not divided by their number, so the loss grows with the batch. Devices, accumulation and rows of
    weight 0 are treated as by `softmax`.
    Source: Zhai et al. 2023, equation 2.

    Args:
        apply: `apply(variables, image, tokens, …)` -> what `logits` reads.
        inputs: batch fields of the model's inputs.

    Returns:
        LossFn with the metrics "own_nll" and "other_nll" (the parts of an image's own text and of the others),
        "image_accuracy" (an image's text is the nearest), "similarity" (cosine of a pair), and "scale".
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        embedded, updates = apply_with(apply, params, *(batch[name] for name in inputs), rng=rng)
        weights = batch["weights"].astype(jnp.float32)
        there, scores = weights > 0, logits(embedded)
        same = jnp.eye(len(scores), dtype=bool)
        nll = jnp.where(there[None], -jax.nn.log_sigmoid(jnp.where(same, scores, -scores)), 0.0)
        own = jnp.diagonal(nll)
        nearest = jnp.where(there[None], scores, _FAR).argmax(axis=1)
        measured = {
            "own_nll": own,
            "other_nll": jnp.where(same, 0.0, nll).sum(axis=1),
            "image_accuracy": nearest == jnp.arange(len(scores)),
        }
        return _loss(own + measured["other_nll"], measured, embedded, weights, updates)

    return loss


def _loss(
    nll: jax.Array, measured: dict[str, jax.Array], embedded: Any, weights: jax.Array, updates: dict[str, Any]
) -> Loss:
    """Sum over the rows; add the pairs' cosine and the scale to what was measured."""
    measured = measured | {
        "similarity": (embedded.image * embedded.text).sum(axis=1),
        "scale": jnp.broadcast_to(embedded.scale, weights.shape),
    }
    weight = weights.sum()
    metrics = {name: (total(jax.lax.stop_gradient(value), weights), weight) for name, value in measured.items()}
    return Loss(total(nll, weights), weight, metrics, updates)
