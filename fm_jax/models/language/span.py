"""Extractive question answering: start and end logits of the answer, on a bidirectional backbone.

Devlin et al. 2019, section 4.2: question and paragraph in one row, and two logits per token.

Dims: B batch, T time, D d_model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import training
from fm_jax.layers.readout import Head, inside, states
from fm_jax.layers.tap import Tap
from fm_jax.ops.attention import MASKED


class SpanFinder(nn.Module):
    """Tokens [B, T] and their lengths [B] -> (start, end), logits [B, T] each; parameters "backbone/…" and "head/…"."""

    backbone: nn.Module
    dropout: float = training(0.0)

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(
        self, tokens: jax.Array, length: jax.Array, types: jax.Array | None = None, *, tap: Tap | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return start and end logits [B, T] in float32 of tokens [B, T]; padding has logit -1e30."""
        hidden = states(self.backbone, tokens, length, types, tap)
        logits = Head(2, dropout=self.dropout, name="head")(hidden)
        real = inside(tokens, length)
        return jnp.where(real, logits[..., 0], MASKED), jnp.where(real, logits[..., 1], MASKED)
