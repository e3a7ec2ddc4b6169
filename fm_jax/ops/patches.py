"""Images as rows of patches, and the positions of their grid.

Dims: B batch, H height, W width, C channels, p patch size, N patches = (H/p)·(W/p) row by row, P = p·p·C, D width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import ConfigError

Grid = tuple[int, int]
How = Literal["bicubic", "linear", "antialiased"]


def patchify(image: jax.Array, size: int) -> jax.Array:
    """Cut an image into patches, each a row of its pixels: [B, H, W, C] -> [B, N, P], P in the order (p, p, C)."""
    batch, height, width, channels = image.shape
    rows, columns = height // size, width // size
    cut = image.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, rows * columns, size * size * channels)


def unpatchify(patches: jax.Array, size: int, grid: Grid) -> jax.Array:
    """Assemble patches of a grid (rows, columns), the inverse of `patchify`: [B, N, P] -> [B, H, W, C]."""
    batch, (rows, columns) = patches.shape[0], grid
    cut = patches.reshape(batch, rows, columns, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, rows * size, columns * size, -1)


def standardise(patches: jax.Array, epsilon: float = 1e-6) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standardise each patch to mean 0 and variance 1: [B, N, P] -> ([B, N, P], mean [B, N, 1], scale [B, N, 1]).

    The variance is the unbiased one, over P - 1, as in published masked autoencoders.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    scale = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + epsilon)
    return (patches - mean) / scale, mean, scale


def sincos(grid: Grid, width: int) -> np.ndarray:
    """Return sine-cosine position embeddings of a grid: [N, D] in float32, computed in float64.

    The first half of D encodes the column, the second the row; each half has sines, then cosines of D/4 frequencies
    10000^(-i / (D/4)). This is the order of the published MAE and MoCo v3.

    Raises:
        ConfigError: the width is not divisible by 4.
    """
    if width % 4:
        raise ConfigError(f"sine-cosine positions need a width divisible by 4, not {width}")
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = (places.ravel() for places in np.mgrid[: grid[0], : grid[1]])
    angles = [np.outer(places, frequencies) for places in (columns, rows)]
    return np.concatenate([turn(angle) for angle in angles for turn in (np.sin, np.cos)], axis=1).astype(np.float32)


def resize(table: jax.Array, old: Grid, new: Grid, how: How = "bicubic") -> jax.Array:
    """Interpolate a grid of vectors [N, D] to another grid [N', D].

    Patch centres are half a patch from the edge. "bicubic" and "linear" do not antialias, as torch's `interpolate`
    without `antialias`. Torch's bicubic kernel is Keys' with a = -0.75, used by DINO, DINOv2 and nearly everything in
    transformers; `jax.image.resize` has a = -0.5, which differs by up to 0.19. "antialiased" is torch's bicubic with
    `antialias`, used by DINOv2 with registers: a = -0.5, the kernel widened by the factor of shrinking.

    Raises:
        ConfigError: the number of rows does not match the old grid.
    """
    if table.shape[0] != old[0] * old[1]:
        raise ConfigError(f"a table of {table.shape[0]} positions does not match a grid of {old[0]} × {old[1]}")
    rows, columns = (jnp.asarray(_weights(was, now, how)) for was, now in zip(old, new, strict=True))
    grid = table.reshape(*old, -1).astype(jnp.float32)
    resized = jnp.einsum("ah,bw,hwd->abd", rows, columns, grid, precision="highest")
    return resized.reshape(new[0] * new[1], -1).astype(table.dtype)


def _weights(old: int, new: int, how: How) -> np.ndarray:
    """Return the interpolation weights [new, old] in float32; positions beyond an edge take the edge's value."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    if how == "antialiased":  # positions beyond an edge are dropped and the remaining weights renormalised
        distance = np.abs(centre[:, None] - np.arange(old)) / max(old / new, 1)
        share = np.where(distance < 2, _keys(distance, -0.5), 0)
        return (share / share.sum(axis=1, keepdims=True)).astype(np.float32)
    left = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2) if how == "bicubic" else (0, 1):
        place = left + step
        distance = np.abs(centre - place)
        share = _keys(distance) if how == "bicubic" else 1 - distance
        np.add.at(weights, (np.arange(new), np.clip(place, 0, old - 1)), share)
    return weights.astype(np.float32)


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Return the cubic convolution kernel at distances up to 2 (Keys 1981, equation 4)."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)
