"""The feature pyramid (Lin et al. 2017): maps of one width from the stages of a backbone, coarse ones added to fine.

Dims: B batch, H height, W width, C channels of a stage, D channels of the pyramid.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.sharding import constrain
from fm_jax.layers.conv import conv
from fm_jax.layers.dense import Initializer


class Pyramid(nn.Module):
    """Maps of stages, fine to coarse, each half as large as the one before -> as many and one more, of one width.

    A stage's map is projected (1×1, "lateral1", …), the next coarser sum is doubled in size and added, and the sum is
    smoothed (3×3, "out1", …). The further map is every other position of the coarsest.
    """

    width: int
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, stages: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Return the maps [B, H, W, D], fine to coarse, of the stages' [B, H, W, C]."""
        options: dict[str, Any] = {"bias": True, "init": self.kernel_init, "dtype": self.dtype}
        above, maps = None, list[jax.Array]()
        for number, stage in reversed(list(enumerate(stages, 1))):
            x = conv(self.width, 1, ("mlp", "embed"), name=f"lateral{number}", **options)(stage)
            above = x if above is None else x + double(above, *x.shape[1:3])
            out = conv(self.width, 3, ("embed", "mlp"), name=f"out{number}", **options)(above)
            maps.insert(0, constrain(out, "batch", None, None, "width"))
        return *maps, maps[-1][:, ::2, ::2]


def double(x: jax.Array, height: int, width: int) -> jax.Array:
    """Repeat every position of [B, H, W, C] twice along both axes, and cut to [B, height, width, C].

    This is nearest-neighbour interpolation where H and W are the halves of height and width, rounded up.
    """
    batch, rows, columns, channels = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
    return wide.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]
