"""Images to tokens: a projection of each patch, its position, and tokens in front that stand for no patch.

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
    """The images, and how they are cut."""

    image_size: tuple[int, int]  # height, width
    patch_size: int
    channels: int = 3
    cls: bool = True  # a learned token in front ([CLS])
    positions: Literal["learned", "sincos"] = "learned"  # sincos: a table that starts so and is never trained
    any_size: bool = False  # take images of other sizes too, the grid of positions resized to theirs
    resizing: How = "bicubic"  # how that is done

    def __post_init__(self) -> None:
        """Refuse what cannot be cut."""
        if min(*self.image_size, self.patch_size, self.channels) < 1:
            raise ConfigError(f"every size of patches must be at least 1: {self}")
        self._divides(self.image_size)

    @property
    def grid(self) -> Grid:
        """Return rows and columns of patches of an image of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def rows(self) -> int:
        """Return how many positions there are: one a patch, and one for the token in front."""
        return self.grid[0] * self.grid[1] + self.cls

    def grid_of(self, image: jax.Array) -> Grid:
        """Return rows and columns of patches of a batch of images.

        Raises:
            ConfigError: no [B, H, W, C], another number of channels, or a size that the config does not take.
        """
        if image.ndim != 4 or image.shape[-1] != self.channels:
            raise ConfigError(
                f"images must be [B, H, W, {self.channels}], not {list(image.shape)}: set patches.channels"
            )
        size = (image.shape[1], image.shape[2])
        if size != self.image_size:
            if not self.any_size:
                raise ConfigError(
                    f"the model is for images of {self.image_size[0]} × {self.image_size[1]}, not {size[0]} × "
                    f"{size[1]}: set data.size or patches.image_size, so that they agree; or patches.any_size; or "
                    "resize the positions (layers/patch_embed.py: regrid)"
                )
            self._divides(size)
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _divides(self, size: Grid) -> None:
        if size[0] % self.patch_size or size[1] % self.patch_size or not min(size):
            raise ConfigError(f"patches of {self.patch_size} do not divide images of {size[0]} × {size[1]}")


def regrid(source: PatchConfig, target: PatchConfig, how: How | None = None) -> Callable[[Any, Any], jax.Array]:
    """Return a `reshape` for `checkpoint/surgery.load` that fits a table of positions to images of another size.

    The row of the token in front stays; where only the target has one, it starts at zero. It is resized as the source
    does it, where `how` does not say otherwise.
    """

    def fit(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        table = jnp.asarray(leaf)
        found = resize(table[int(source.cls) :], source.grid, target.grid, how or source.resizing)
        if target.cls:
            first = table[:1] if source.cls else jnp.zeros_like(table[:1])
            found = jnp.concatenate([first, found])
        return found.astype(wanted.dtype)

    return fit


def positions(module: nn.Module, cfg: PatchConfig, width: int, grid: Grid, init: Initializer) -> jax.Array:
    """Declare a module's table "positions" [N (+ 1), D], the first row of the token in front; return a grid's rows."""
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
    """Images [B, H, W, C] -> tokens [B, (1 +) R + N, D], or of the patches kept only [B, (1 +) R + K, D]."""

    cfg: PatchConfig
    width: int
    kernel_init: Initializer
    table_init: Initializer
    dtype: Any = jnp.float32
    registers: int = 0  # R: learned tokens before the patches, which have no position (Darcet et al. 2024)

    @nn.compact
    def __call__(self, image: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Project the patches and add their positions.

        A strided convolution in torch; as a product of patches, those that are not kept are never touched.

        Args:
            image: [B, H, W, C].
            keep: [B, K], numbers of the patches to read; None for all.

        Raises:
            ConfigError: images that the config does not take.
        """
        cfg, width = self.cfg, self.width
        grid = cfg.grid_of(image)
        patches = patchify(image, cfg.patch_size)
        shape = (cfg.patch_size, cfg.patch_size, cfg.channels, width)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, (None, None, None, "embed")), shape, jnp.float32
        )
        zeros = nn.initializers.zeros_init()
        bias = self.param("bias", nn.with_logical_partitioning(zeros, ("embed",)), (width,), jnp.float32)
        table = positions(self, cfg, width, grid, self.table_init).astype(self.dtype)
        where = table[None, int(cfg.cls) :]
        if keep is not None:
            patches, where = pick(patches, keep), jnp.take(where[0], keep, axis=0)
        flat = kernel.reshape(-1, width).astype(self.dtype)
        product = flat_dot_general(patches.astype(self.dtype), flat, (((2,), (0,)), ((), ())))
        x = product + bias.astype(self.dtype)[None, None] + where
        front = []
        if cfg.cls:
            cls = self.param("cls", nn.with_logical_partitioning(self.table_init, ("embed",)), (width,), jnp.float32)
            front.append((cls.astype(self.dtype) + table[0])[None])
        if self.registers:
            boxed = nn.with_logical_partitioning(self.table_init, (None, "embed"))
            front.append(self.param("registers", boxed, (self.registers, width), jnp.float32).astype(self.dtype))
        return jnp.concatenate([*(jnp.broadcast_to(row, (x.shape[0], *row.shape)) for row in front), x], axis=1)
