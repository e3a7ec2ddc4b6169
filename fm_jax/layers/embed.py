"""Token and learned position embeddings, and the tied output head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.sharding import constrain
from fm_jax.layers.dense import Initializer
from fm_jax.ops.matmul import flat_dot_general


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
        # Gather the width first (as for every fsdp parameter): looking up rows in a table split along its width
        # makes the partitioner replicate the [B, T, D] result.
        x = jnp.take(constrain(self.tokens, "vocab", None), tokens, axis=0).astype(self.dtype)
        if self.max_length:
            rows = jnp.take(self.positions, positions, axis=0).astype(self.dtype)
            x = x + jnp.broadcast_to(rows, x.shape)
        return x

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Return the logits of hidden states by the tied head: [..., D] -> [..., V] in float32."""
        table = self.tokens.astype(self.dtype)
        contract = (((hidden.ndim - 1,), (0,)), ((), ()))
        return flat_dot_general(hidden, table.T, contract, preferred_element_type=jnp.float32)
