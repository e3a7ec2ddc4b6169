"""Token classification on any backbone that has `hidden(tokens) -> [B, T, D]`.

Devlin et al. 2019, section 5.3 (named entities). With one label and a hidden layer it is ELECTRA's discriminator (Clark
et al. 2020), which predicts the tokens that a generator replaced.

Dims: B batch, T time, D d_model, C labels.
"""

import flax.linen as nn
import jax

from fm_jax.core.config import training
from fm_jax.layers.readout import Head, Hidden, states
from fm_jax.layers.tap import Tap


class Tagger(nn.Module):
    """Tokens [B, T] and their lengths [B] -> logits [B, T, C]; parameters "backbone/…" and "head/…"."""

    backbone: nn.Module
    num_labels: int
    dropout: float = training(0.0)
    hidden: Hidden = "none"  # activation of a layer before the last one

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(
        self, tokens: jax.Array, length: jax.Array, types: jax.Array | None = None, *, tap: Tap | None = None
    ) -> jax.Array:
        """Return every token's logits [B, T, C] in float32; those of padding are meaningless."""
        hidden = states(self.backbone, tokens, length, types, tap)
        return Head(self.num_labels, self.hidden, dropout=self.dropout, name="head")(hidden)


def discriminator(backbone: nn.Module) -> Tagger:
    """Return ELECTRA's discriminator: logits [B, T, 1], positive for replaced tokens."""
    return Tagger(backbone, 1, hidden="gelu")
