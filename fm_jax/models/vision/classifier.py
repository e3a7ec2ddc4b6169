"""An image classifier on any backbone that has `features(image) -> [B, D]`.

Dims: B batch, H height, W width, D the backbone's features, C classes.
"""

import flax.linen as nn
import jax

from fm_jax.core.config import training
from fm_jax.layers.readout import Head
from fm_jax.layers.tap import Tap


class ImageClassifier(nn.Module):
    """Images [B, H, W, channels] -> logits [B, C]; parameters "backbone/…" and "head/…"."""

    backbone: nn.Module
    num_classes: int
    dropout: float = training(0.0)  # dropout rate of the features
    bias: bool = True

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Classify images [B, H, W, channels]: logits [B, C] in float32."""
        features = self.backbone.features(image, tap=tap)
        return Head(self.num_classes, bias=self.bias, dropout=self.dropout, name="head")(features)
