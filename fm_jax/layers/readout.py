"""Pooling of a backbone's hidden states, and the head of a task.

Dims: B batch, T time, D d_model, C outputs.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.mlp import ACTIVATIONS
from fm_jax.layers.tap import Tap
from fm_jax.ops.matmul import flat_dot_general

Pool = Literal["mean", "last", "first"]
Hidden = Literal["none", "tanh", "relu", "gelu"]


def states(
    backbone: nn.Module, tokens: jax.Array, length: jax.Array, types: jax.Array | None, tap: Tap | None
) -> jax.Array:
    """Return a backbone's hidden states [B, T, D] of tokens [B, T] with `length` [B] real tokens per row.

    A bidirectional backbone masks the padding; a causal one needs no mask because padding comes last.

    Raises:
        ConfigError: token types were given for a causal backbone, which has none.
    """
    if not backbone.causal:
        return backbone.hidden(tokens, types=types, segments=inside(tokens, length).astype(jnp.int32), tap=tap)
    if types is not None:
        raise ConfigError(f"{type(backbone).__name__} has no token types; remove `types` from the inputs")
    return backbone.hidden(tokens, tap=tap)


def inside(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Return which tokens are real: [B, T, …], [B] -> bool [B, T]."""
    return jnp.arange(tokens.shape[1])[None] < length[:, None]


def pool(hidden: jax.Array, length: jax.Array, how: Pool) -> jax.Array:
    """Pool each row's real tokens to one vector: [B, T, D], [B] -> [B, D] in float32."""
    hidden = hidden.astype(jnp.float32)
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    real = inside(hidden, length).astype(jnp.float32)
    return jnp.einsum("btd,bt->bd", hidden, real) / jnp.maximum(length, 1)[:, None]


class Head(nn.Module):
    """Linear head [..., D] -> [..., C] in float32, with an optional hidden layer "hidden/…" of width D."""

    features: int
    hidden: Hidden = "none"  # activation of the hidden layer; none: no hidden layer
    bias: bool = True
    dropout: float = 0.0  # dropout rate of the last layer's input
    axis: str = "classes"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the outputs: [..., D] -> [..., C]."""
        x = x.astype(jnp.float32)
        width, init = x.shape[-1], normal(0.02)
        if self.hidden != "none":
            act = jnp.tanh if self.hidden == "tanh" else ACTIVATIONS[self.hidden]
            x = act(dense(width, ("embed", None), bias=True, init=init, dtype=jnp.float32, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        table = nn.with_logical_partitioning(init, ("embed", self.axis))
        kernel = self.param("kernel", table, (width, self.features), jnp.float32)
        out = flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if not self.bias:
            return out
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (self.axis,))
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return out + bias.reshape((1,) * (x.ndim - 1) + (self.features,))
