"""Reconstruction loss of a masked autoencoder (He et al. 2022).

Batch fields: image [B, H, W, C], weights [B] (0 for padding rows), and optionally noise [B, N], which decides the masks
of N patches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.types import Batch, Loss, LossFn, Params


def masked_patches(apply: Callable[..., Any]) -> LossFn:
    """Make the mean squared error of a `MAE` over the pixels of the masked patches.

    Every step masks other patches. Without a key (evaluation) the masks depend on a fixed key and on the image itself:
    an evaluation gives the same numbers for every batch size.

    Args:
        apply: `model.apply`, with the method "reconstruct".

    Returns:
        LossFn with the metric "mse", per masked patch.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        if rng is None:
            rngs = {"mask": jax.random.key(0)}
        else:
            rngs = dict(zip(("mask", "dropout"), jax.random.split(rng), strict=True))
        drawing = apply({"params": params}, batch["image"], batch.get("noise"), rngs=rngs, method="reconstruct")
        error = jnp.square(drawing.prediction - drawing.target).mean(axis=-1)
        weights = drawing.removed * batch["weights"].astype(jnp.float32)[:, None]
        total, weight = (error * weights).sum(), weights.sum()
        return Loss(total, weight, {"mse": (total, weight)})

    return loss
