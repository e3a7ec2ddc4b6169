"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020).

Batch fields: image_a, image_b [B, ...] (two views of each image), weights [B] (0 for padding rows).

Dims: B images, V = 2B views, P size of the projection.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.core.statistics import apply_with
from fm_jax.core.types import Batch, Loss, LossFn, Params
from fm_jax.objectives.embed import unit


def nt_xent(
    apply: Callable[..., Any], views: tuple[str, str] = ("image_a", "image_b"), *, temperature: float = 0.1
) -> LossFn:
    """Make SimCLR's loss: cross-entropy of a view's partner among the other 2B - 1 views; logits: cosine / temperature.

    The loss is the mean over both views of every image, equation 1 of Chen et al. 2020 (their TensorFlow code adds the
    means of the two sides, which is twice that). Both views go through the model as one batch of 2B, so batch
    normalisation computes its moments over both. Under `jit` the batch is the global one on any number of devices:
    moments and negatives come from all devices, and gradients flow to them. With accumulation a view is compared only
    with views of its own microbatch, and under pmap only with those of its own replica. Rows of weight 0 are neither
    anchors nor negatives (but batch normalisation includes them).

    Args:
        apply: `apply(variables, images, …) -> projections [V, P]`, not normalised.
        views: batch fields of the two views.
        temperature: divisor of the cosines.

    Returns:
        LossFn with the metrics "accuracy" (no other view is nearer than the partner), "entropy" (of the distribution
        over the candidates, in nats) and "similarity" (cosine to the partner), all per weighted view.

    Raises:
        ConfigError: the temperature is not finite and above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be finite and above 0, not {temperature}")

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        first, second = (batch[name] for name in views)
        out, updates = apply_with(apply, params, _alternate(first, second), rng=rng)
        z = unit(out)
        cosine = compare(z, z)
        partner = jnp.arange(len(z)) ^ 1
        weights = _alternate(batch["weights"], batch["weights"]).astype(jnp.float32)
        others = (weights > 0)[None] & ~jnp.eye(len(z), dtype=bool)
        log_p = jax.nn.log_softmax(jnp.where(others, cosine / temperature, -1e30))
        nll = -jnp.take_along_axis(log_p, partner[:, None], axis=1)[:, 0]
        measured = {
            "accuracy": log_p.argmax(axis=1) == partner,
            "entropy": -(jnp.exp(log_p) * log_p).sum(axis=1),
            "similarity": jnp.take_along_axis(cosine, partner[:, None], axis=1)[:, 0],
        }
        weight = weights.sum()
        metrics = {name: (total(value, weights), weight) for name, value in measured.items()}
        return Loss(total(nll, weights), weight, metrics, updates)

    return loss


def _alternate(first: jax.Array, second: jax.Array) -> jax.Array:
    """Interleave two [B, ...] to [2B, ...], an image's two views in adjacent rows, so that no row leaves its device."""
    return jnp.stack([first, second], axis=1).reshape(2 * len(first), *first.shape[1:])


def compare(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Return the products [A, B] of vectors [A, P] and [B, P], those of unit length being cosines.

    The second factor is gathered: each device compares its own rows with the columns of all devices, and the gradient
    flows back to all of them.
    """
    rows, columns = constrain(rows, "batch", None), constrain(columns, None, None)
    return jnp.einsum("ap,bp->ab", rows, columns, precision=jax.lax.Precision.HIGHEST)


def total(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted sum [] of values [V]; a value of weight 0 may be anything, even nan."""
    return jnp.where(weights > 0, values * weights, 0.0).sum()
