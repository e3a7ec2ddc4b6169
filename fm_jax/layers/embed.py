"""Token and learned position embeddings, and the tied output head."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.sharding import constrain, ways
from fm_jax.layers.dense import Initializer
from fm_jax.ops.matmul import flat_dot_general

# Where fsdp splits the table's width, both uses of it gather the same array, once, in the computation's dtype: looking
# up rows in a table split along its width would make the partitioner replicate the [B, T, D] result. A plain constraint
# would also hold its own gradient whole, which is then all-reduced, [V, D] in float32; so the gradients say that they
# are split as the table is.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(table: jax.Array, dtype: Any) -> jax.Array:
    """Return the table [V, D] in `dtype` with its width gathered; its gradient is split."""
    return constrain(table.astype(dtype), "vocab", None)


def _whole_forward(table: jax.Array, dtype: Any) -> tuple[jax.Array, None]:
    return _whole(table, dtype), None


def _whole_backward(dtype: Any, _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (constrain(grad, "vocab", "embed").astype(jnp.float32),)


_whole.defvjp(_whole_forward, _whole_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rows(table: jax.Array, tokens: jax.Array, vocab_size: int, dtype: Any) -> jax.Array:
    """Return rows [B, T, D] of the table [V, D] in `dtype`; their gradients are added in float32 and split."""
    return jnp.take(constrain(table.astype(dtype), "vocab", None), tokens, axis=0)


def _rows_forward(table: jax.Array, tokens: jax.Array, vocab_size: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return _rows(table, tokens, vocab_size, dtype), tokens


def _rows_backward(vocab_size: int, dtype: Any, tokens: jax.Array, grad: jax.Array) -> tuple[jax.Array, None]:
    table = jax.ShapeDtypeStruct((vocab_size, grad.shape[-1]), jnp.float32)
    tokens = constrain(tokens, "replica", "time")
    # fsdp goes from the rows to the width, where each device adds its own part; without the first of these constraints
    # the second would spread to the forward pass.
    grad = constrain(constrain(grad, "batch", "time", "width"), "replica", "time", "embed")
    add = jax.linear_transpose(lambda rows: jnp.take(rows, tokens, axis=0), table)
    return constrain(add(grad.astype(jnp.float32))[0], "vocab", "embed"), None


_rows.defvjp(_rows_forward, _rows_backward)


class Embed(nn.Module):
    """Token table [V, D] and, if `max_length` > 0, position table [P, D]; the token table is also the tied head."""

    vocab_size: int
    d_model: int
    max_length: int  # rows of the position table; 0 for none
    kernel_init: Initializer
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the tables."""
        table = nn.with_logical_partitioning(self.kernel_init, ("vocab", "embed"))
        self.tokens = self.param("tokens", table, (self.vocab_size, self.d_model), jnp.float32)
        if self.max_length:
            rows = nn.with_logical_partitioning(self.kernel_init, (None, "embed"))
            self.positions = self.param("positions", rows, (self.max_length, self.d_model), jnp.float32)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Look up ids [B, T] at positions [B or 1, T] -> [B, T, D]."""
        if ways("embed") > 1:
            x = _rows(self.tokens, tokens, self.vocab_size, self.dtype)
        else:
            x = jnp.take(self.tokens, tokens, axis=0).astype(self.dtype)
        if self.max_length:
            rows = jnp.take(self.positions, positions, axis=0).astype(self.dtype)
            x = x + jnp.broadcast_to(rows, x.shape)
        return x

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Return the logits of hidden states by the tied head: [..., D] -> [..., V] in float32."""
        table = _whole(self.tokens, self.dtype) if ways("embed") > 1 else self.tokens.astype(self.dtype)
        contract = (((hidden.ndim - 1,), (0,)), ((), ()))
        return flat_dot_general(hidden, table.T, contract, preferred_element_type=jnp.float32)
