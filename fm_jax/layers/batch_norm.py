"""Batch normalisation with its running statistics as explicit state.

The running mean and variance are ordinary leaves of the parameters, so checkpoints, name tables and loading need no
special case. They are never trained (`core/statistics.py` splits them off); the training step replaces them.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.sharding import constrain
from fm_jax.layers.dense import Initializer


class BatchNorm(nn.Module):
    """Normalise every channel over the batch: [..., C] -> [..., C] (Ioffe & Szegedy 2015).

    If the collection "statistics" is mutable (training), it normalises by the moments of this batch and writes the next
    running moments to that collection; otherwise it normalises by the running moments. Under `jit` the batch is the
    global one, so the moments are those of all devices. The running variance is the unbiased one, as in torch.

    Frozen, it is one affine map a channel, as detectors have in pretrained backbones: the few large images of a batch
    give poor moments.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9  # share of the old running moments; torch's momentum is 1 - this
    scale_init: Initializer = nn.initializers.ones_init()
    dtype: Any = jnp.float32
    frozen: bool = False  # whether training, too, uses the running moments, and moves neither these nor scale and bias
    added_to: Literal["variance", "deviation"] = "variance"  # what epsilon is added to; "deviation": as in Darknet

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalised, scaled and shifted activations [..., C] in the compute dtype."""
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
        held |= jax.lax.stop_gradient(held if self.frozen else {name: held[name] for name in ("mean", "var")})
        mean, var = held["mean"], held["var"]
        if not self.frozen and self.is_mutable_collection("statistics") and not self.is_initializing():
            axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            batch_mean = x.mean(axis=axes)
            batch_var = jnp.square(x - _wide(batch_mean, x)).mean(axis=axes)
            unbiased = batch_var * (count / max(count - 1, 1))
            for name, old, new in (("mean", mean, batch_mean), ("var", var, unbiased)):
                # constrain to the leaf's layout; otherwise the second step would get a state of another layout
                moved = constrain(self.momentum * old + (1 - self.momentum) * new, "norm")
                self.put_variable("statistics", name, moved)
            mean, var = batch_mean, batch_var
        if self.added_to == "variance":
            factor = jax.lax.rsqrt(var + self.epsilon) * held["scale"]
        else:  # at least 1e-15, far below epsilon: the gradient of a root is infinite at 0
            factor = held["scale"] / (jnp.sqrt(jnp.maximum(var, 1e-30)) + self.epsilon)
        return ((x - _wide(mean, x)) * _wide(factor, x) + _wide(held["bias"], x)).astype(self.dtype)


def _wide(channels: jax.Array, x: jax.Array) -> jax.Array:
    return channels.reshape((1,) * (x.ndim - 1) + channels.shape)
