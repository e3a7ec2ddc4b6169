"""SimCLR (Chen et al. 2020): a backbone, and the small head whose output two views of an image are compared by.

The head is thrown away after pretraining: what it forgets (where a thing stands, its colour) a task may need, so the
backbone's features classify better than the head's output (section 4.2).

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

    The backbone is any with `features(image) -> [B, D]`.
    """

    backbone: nn.Module
    out: int = 128
    norm_momentum: float = 0.9  # of the head's normalisations: share of the running moments that stays at each step

    @property
    def sites(self) -> tuple[str, ...]:
        """Name the backbone's sites: the head adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the projections, not yet scaled to length 1."""
        return Projection(self.out, self.norm_momentum, name="project")(self.backbone.features(image, tap=tap))


class Projection(nn.Module):
    """The first version's head: linear, normalised, rectified, linear, normalised; [B, D] -> [B, out].

    The hidden layer is as wide as the features. No linear layer has a bias: the normalisation after it would take it
    out again. The authors' last normalisation has no shift (google-research/simclr, model_util.py).
    """

    out: int
    norm_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output in float32."""
        x = x.astype(jnp.float32)
        x = self._layer(x, "hidden", x.shape[-1], ("embed", "mlp"))
        return self._layer(jax.nn.relu(x), "out", self.out, ("mlp", "embed"))

    def _layer(self, x: jax.Array, name: str, width: int, axes: tuple[str, str]) -> jax.Array:
        x = dense(width, axes, bias=False, init=normal(0.0), dtype=jnp.float32, name=name)(x)
        return BatchNorm(momentum=self.norm_momentum, name=f"norm_{name}")(x)
