"""A text classifier on any backbone that has `hidden(tokens) -> [B, T, D]`.

Radford et al. 2018 read the last token's state, Devlin et al. 2019 the first's through one more layer (tanh, and so
RoBERTa; DistilBERT relu, ELECTRA gelu); the mean over the tokens serves small models better.

Dims: B batch, T time, D d_model, C classes.
"""

import flax.linen as nn
import jax

from fm_jax.core.config import training
from fm_jax.layers.readout import Head, Hidden, Pool, pool, states
from fm_jax.layers.tap import Tap


class Classifier(nn.Module):
    """Tokens [B, T] and their lengths [B] -> logits [B, C]; parameters "backbone/…" and "head/…"."""

    backbone: nn.Module
    num_classes: int
    pool: Pool = "mean"
    dropout: float = training(0.0)
    hidden: Hidden = "none"  # activation of a layer before the last one
    bias: bool = True

    @property
    def sites(self) -> tuple[str, ...]:
        """Name the backbone's sites: the pooled head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(
        self, tokens: jax.Array, length: jax.Array, types: jax.Array | None = None, *, tap: Tap | None = None
    ) -> jax.Array:
        """Pool the hidden states of the first `length` tokens of each row and classify them, in float32."""
        pooled = pool(states(self.backbone, tokens, length, types, tap), length, self.pool)
        return Head(self.num_classes, self.hidden, self.bias, self.dropout, name="head")(pooled)
