"""SimCLR (Chen et al. 2020): a backbone and a projection head for the contrastive loss.

The head is discarded after pretraining. It loses information that a task may need (an object's place or colour), so
the backbone's features classify better than the head's output (section 4.2).

Dims: B batch, H height, W width, D the backbone's features, P the head's output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.batch_norm import BatchNorm
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.tap import Tap


class SimCLR(nn.Module):
    """Images [B, H, W, channels] -> projections [B, P] in float32; parameters "backbone/…" and "project/…".

    The backbone may be any module with `features(image) -> [B, D]`.
    """

    backbone: nn.Module
    out: int = 128
    norm_momentum: float = 0.9  # share of the old running moments in the head's batch norms at each step

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the projections [B, P] of images [B, H, W, channels]; they are not scaled to length 1."""
        return Projection(self.out, self.norm_momentum, name="project")(self.backbone.features(image, tap=tap))


class Projection(nn.Module):
    """SimCLR v1's projection head: linear, batch norm, ReLU, linear, batch norm; [B, D] -> [B, out].

    The hidden layer is as wide as the features. Linear layers have no bias because the batch norm would remove it. The
    authors' last batch norm has no bias (google-research/simclr, model_util.py).
    """

    out: int
    norm_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Project features [B, D] to [B, out] in float32."""
        x = x.astype(jnp.float32)
        x = self._layer(x, "hidden", x.shape[-1], ("embed", "mlp"))
        return self._layer(jax.nn.relu(x), "out", self.out, ("mlp", "embed"))

    def _layer(self, x: jax.Array, name: str, width: int, axes: tuple[str, str]) -> jax.Array:
        x = dense(width, axes, bias=False, init=normal(0.0), dtype=jnp.float32, name=name)(x)
        return BatchNorm(momentum=self.norm_momentum, name=f"norm_{name}")(x)
