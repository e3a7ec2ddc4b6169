"""Images to tokens: a projection of each patch plus its position, after a [CLS] token and registers.

Dims: B batch, H height, W width, C channels, p patch size, N patches, P = p·p·C, K patches kept, R registers, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.layers.dense import Initializer
from fm_jax.ops.matmul import flat_dot_general
from fm_jax.ops.patches import Grid, How, patchify, resize, sincos
from fm_jax.ops.random_masking import pick


@dataclass(frozen=True)
class PatchConfig:
    """Image size, patch size and positions."""

    image_size: tuple[int, int]  # height, width
    patch_size: int
    channels: int = 3
    cls: bool = True  # a learned token before the patches ([CLS])
    positions: Literal["learned", "sincos"] = "learned"  # sincos: a fixed table
    any_size: bool = False  # accept images of other sizes, with the grid of positions interpolated
    resizing: How = "bicubic"  # interpolation of the positions
    bias: bool = True  # of the projection of the patches

    def __post_init__(self) -> None:
        """Check that sizes are positive and divisible."""
        if min(*self.image_size, self.patch_size, self.channels) < 1:
            raise ConfigError(f"image_size, patch_size and channels must be at least 1, not {self}")
        self._divides(self.image_size)

    @property
    def grid(self) -> Grid:
        """Return (rows, columns) of patches of an image of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def rows(self) -> int:
        """Return the number of positions: one per patch, and one for the [CLS] token."""
        return self.grid[0] * self.grid[1] + self.cls

    def grid_of(self, image: jax.Array) -> Grid:
        """Return (rows, columns) of patches of a batch of images [B, H, W, C].

        Raises:
            ConfigError: not [B, H, W, C], another number of channels, or a size that the config does not accept.
        """
        if image.ndim != 4 or image.shape[-1] != self.channels:
            raise ConfigError(
                f"images must be [B, H, W, {self.channels}], not {list(image.shape)}; set patches.channels"
            )
        size = (image.shape[1], image.shape[2])
        if size != self.image_size:
            if not self.any_size:
                raise ConfigError(
                    f"the model is for images of {self.image_size[0]} × {self.image_size[1]}, not {size[0]} × "
                    f"{size[1]}; make data.size and patches.image_size equal, set patches.any_size, or interpolate "
                    "the positions (regrid in layers/patch_embed.py)"
                )
            self._divides(size)
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _divides(self, size: Grid) -> None:
        if size[0] % self.patch_size or size[1] % self.patch_size or not min(size):
            raise ConfigError(f"images of {size[0]} × {size[1]} are not divisible into patches of {self.patch_size}")


def regrid(source: PatchConfig, target: PatchConfig, how: How | None = None) -> Callable[[Any, Any], jax.Array]:
    """Return a `reshape` for `checkpoint/surgery.load` that interpolates a position table to another image size.

    The [CLS] token's row is kept; if only the target has one, it starts at zero. The default interpolation is that of
    the source config.
    """

    def fit(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        table = jnp.asarray(leaf)
        resized = resize(table[int(source.cls) :], source.grid, target.grid, how or source.resizing)
        if target.cls:
            first = table[:1] if source.cls else jnp.zeros_like(table[:1])
            resized = jnp.concatenate([first, resized])
        return resized.astype(wanted.dtype)

    return fit


def positions(module: nn.Module, cfg: PatchConfig, width: int, grid: Grid, init: Initializer) -> jax.Array:
    """Declare a module's table "positions" [(1 +) N, D] ([CLS] first); return the rows [(1 +) N', D] for a grid."""
    fixed = cfg.positions == "sincos"
    boxed = nn.with_logical_partitioning(partial(_fixed, cfg) if fixed else init, (None, "embed"))
    table = module.param("positions", boxed, (cfg.rows, width), jnp.float32)
    if fixed:
        table = jax.lax.stop_gradient(table)
    if grid == cfg.grid:
        return table
    return jnp.concatenate([table[: int(cfg.cls)], resize(table[int(cfg.cls) :], cfg.grid, grid, cfg.resizing)])


def _fixed(cfg: PatchConfig, _: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    table = jnp.asarray(sincos(cfg.grid, shape[1]), dtype)
    return jnp.concatenate([jnp.zeros((int(cfg.cls), shape[1]), dtype), table])


class PatchEmbed(nn.Module):
    """Images [B, H, W, C] -> tokens [B, (1 +) R + N, D], or of kept patches only [B, (1 +) R + K, D]."""

    cfg: PatchConfig
    width: int
    kernel_init: Initializer
    table_init: Initializer
    dtype: Any = jnp.float32
    registers: int = 0  # R: learned tokens without position before the patches (Darcet et al. 2024)

    @nn.compact
    def __call__(self, image: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Project the patches and add their positions.

        Torch uses a strided convolution; a matrix product of patches never computes masked ones.

        Args:
            image: images [B, H, W, C].
            keep: indices [B, K] of the patches to read; None: all.

        Raises:
            ConfigError: the config does not accept the images.
        """
        cfg, width = self.cfg, self.width
        grid = cfg.grid_of(image)
        patches = patchify(image, cfg.patch_size)
        shape = (cfg.patch_size, cfg.patch_size, cfg.channels, width)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, (None, None, None, "embed")), shape, jnp.float32
        )
        table = positions(self, cfg, width, grid, self.table_init).astype(self.dtype)
        where = table[None, int(cfg.cls) :]
        if keep is not None:
            patches, where = pick(patches, keep), jnp.take(where[0], keep, axis=0)
        flat = kernel.reshape(-1, width).astype(self.dtype)
        product = flat_dot_general(patches.astype(self.dtype), flat, (((2,), (0,)), ((), ())))
        if cfg.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
            product = product + self.param("bias", zeros, (width,), jnp.float32).astype(self.dtype)[None, None]
        x = product + where
        front = []
        if cfg.cls:
            cls = self.param("cls", nn.with_logical_partitioning(self.table_init, ("embed",)), (width,), jnp.float32)
            front.append((cls.astype(self.dtype) + table[0])[None])
        if self.registers:
            boxed = nn.with_logical_partitioning(self.table_init, (None, "embed"))
            front.append(self.param("registers", boxed, (self.registers, width), jnp.float32).astype(self.dtype))
        return jnp.concatenate([*(jnp.broadcast_to(row, (x.shape[0], *row.shape)) for row in front), x], axis=1)
