"""Batch normalisation with its running statistics as explicit state.

The running mean and variance are leaves of the parameters like any other, so checkpoints, name tables and loading know
nothing of them; they are never trained (`objectives/statistics.py` splits them off), and the step puts in the new ones.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.sharding import constrain
from fm_jax.layers.dense import Initializer


class BatchNorm(nn.Module):
    """Normalise every channel over the batch: [..., C] -> [..., C] (Ioffe & Szegedy 2015).

    Where the collection "statistics" is mutable, that is in training, with the moments of this batch, and the next
    running ones are written to that collection; else with the running ones. Under `jit` the batch is the global one,
    so the moments are those of all devices. The running variance is the unbiased one, as in torch.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9  # share of the running moments that stays; torch calls 1 - this its momentum
    scale_init: Initializer = nn.initializers.ones_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalised, scaled and shifted activations in the compute dtype."""
        inits = {
            "scale": self.scale_init,
            "bias": nn.initializers.zeros_init(),
            "mean": nn.initializers.zeros_init(),
            "var": nn.initializers.ones_init(),
        }
        held = {
            name: self.param(name, nn.with_logical_partitioning(init, ("norm",)), x.shape[-1:], jnp.float32)
            for name, init in inits.items()
        }
        x = x.astype(jnp.float32)
        mean, var = jax.lax.stop_gradient((held["mean"], held["var"]))
        if self.is_mutable_collection("statistics") and not self.is_initializing():
            axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            batch_mean = x.mean(axis=axes)
            batch_var = jnp.square(x - _wide(batch_mean, x)).mean(axis=axes)
            unbiased = batch_var * (count / max(count - 1, 1))
            for name, old, new in (("mean", mean, batch_mean), ("var", var, unbiased)):
                # laid out as the leaf is, or a step's second call would meet a state of another layout
                moved = constrain(self.momentum * old + (1 - self.momentum) * new, "norm")
                self.put_variable("statistics", name, moved)
            mean, var = batch_mean, batch_var
        factor = jax.lax.rsqrt(var + self.epsilon) * held["scale"]
        return ((x - _wide(mean, x)) * _wide(factor, x) + _wide(held["bias"], x)).astype(self.dtype)


def _wide(channels: jax.Array, x: jax.Array) -> jax.Array:
    return channels.reshape((1,) * (x.ndim - 1) + channels.shape)
