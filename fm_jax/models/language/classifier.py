"""A text classifier on any backbone that has `hidden(tokens) -> [B, T, D]`.

Radford et al. 2018 read the last token's state; the mean over the tokens serves small models better.

Dims: B batch, T time, D d_model, C classes.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.dense import dense, normal
from fm_jax.layers.tap import Tap


class Classifier(nn.Module):
    """Tokens [B, T] and their lengths [B] -> logits [B, C]; parameters "backbone/…" and "head/…"."""

    backbone: nn.Module
    num_classes: int
    pool: Literal["mean", "last"] = "mean"
    dropout: float = 0.0

    @property
    def sites(self) -> tuple[str, ...]:
        """Name the backbone's sites: the pooled head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(self, tokens: jax.Array, length: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Pool the hidden states of the first `length` tokens of each row and classify them, in float32."""
        hidden = self.backbone.hidden(tokens, tap=tap)
        pooled = pool(hidden, length, self.pool)
        pooled = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(pooled)
        head = dense(
            self.num_classes, ("embed", "classes"), bias=True, init=normal(0.02), dtype=jnp.float32, name="head"
        )
        return head(pooled)


def pool(hidden: jax.Array, length: jax.Array, how: Literal["mean", "last"]) -> jax.Array:
    """Return one vector a row: [B, T, D], [B] -> [B, D] in float32, padding left out."""
    hidden = hidden.astype(jnp.float32)
    if how == "last":
        return jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    inside = (jnp.arange(hidden.shape[1])[None] < length[:, None]).astype(jnp.float32)
    return jnp.einsum("btd,bt->bd", hidden, inside) / jnp.maximum(length, 1)[:, None]
