"""RoIAlign (He et al. 2017, Mask R-CNN): crop boxes from feature maps to one size, by bilinear interpolation.

A box is divided into size × size bins, and a bin is the mean of sampling × sampling points. Interpolation acts on rows
and columns alone, so a crop is A · map · Bᵀ with a matrix [size, H] for the rows and one [size, W] for the columns.
There are two forms of the same sums:

- products: both matrices dense. Their gradient is a product too, but the cost grows with the map.
- gather: only the rows and columns that have a weight are read. The cost does not depend on the map, but the gradient
  is a scatter, which XLA runs row by row on a CPU.

CPU milliseconds of 7 × 7 bins of 2 × 2 points, forward / with the gradient, on two busy cores (the ratios are what
counts):

| images × boxes × channels | finest map | products | gather |
|---|---|---|---|
| 1 × 64 × 64 | 24 × 24 | 2.1 / 12 | 3.3 / 6 |
| 8 × 32 × 64 | 24 × 24 | 21 / 60 | 74 / 112 |
| 1 × 512 × 256 | 56 × 56 | 596 / 1660 | 301 / 496 |
| 1 × 512 × 256 | 200 × 200 | 2385 / 8483 | 385 / 589 |

Dims: B batch, K boxes, H height, W width, C channels, P = Q = size of a crop, S = sampling, N points of a pyramid.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.ops.boxes import area

_LARGEST = 32 * 32  # positions of the finest map up to which the products are used
_NUMBERS = 1 << 24  # in the largest intermediate array: boxes are cropped in parts that keep below it


def roi_align(
    features: jax.Array, boxes: jax.Array, size: int, scale: float, sampling: int = 2, *, aligned: bool = False
) -> jax.Array:
    """Crop boxes [B, K, 4] from a map [B, H, W, C] to [B, K, size, size, C].

    Args:
        features: one map an image.
        boxes: (left, top, right, bottom) in pixels of the image.
        size: bins of a crop along each axis.
        scale: positions of the map per pixel of the image, such as 1/16.
        sampling: points of a bin along each axis.
        aligned: whether the value of a position is that of its centre, half a position from its corner. torchvision's
            Faster R-CNN has False: it is trained so, and sides are then at least one position long.

    A point more than one position outside the map is 0, as in torchvision's kernels.
    """
    level = jnp.zeros(boxes.shape[:2], jnp.int32)
    return _crop((features,), boxes, level, size, (scale,), sampling, aligned)


def pyramid_roi_align(
    maps: Sequence[jax.Array],
    boxes: jax.Array,
    size: int,
    scales: Sequence[float],
    sampling: int = 2,
    *,
    aligned: bool = False,
    canonical: float = 224.0,
) -> jax.Array:
    """Crop each box [B, K, 4] from the one map that fits its size: [B, K, size, size, C].

    Args:
        maps: [B, H, W, C] each, from fine to coarse, every one half as large as the one before.
        boxes: see `roi_align`.
        size: see `roi_align`.
        scales: of each map, see `roi_align`.
        sampling: see `roi_align`.
        aligned: see `roi_align`.
        canonical: side in pixels of a box that is cropped from the map with scale 1/16; see `levels`.
    """
    finest = round(-math.log2(scales[0]))
    return _crop(
        tuple(maps), boxes, levels(boxes, finest, len(maps), canonical), size, tuple(scales), sampling, aligned
    )


def levels(boxes: jax.Array, finest: int, count: int, canonical: float = 224.0) -> jax.Array:
    """Return for boxes [..., 4] the index [...] int32 of their map in a pyramid (Lin et al. 2017, equation 1).

    The map of stride 2^k is that of boxes whose side (the root of their area) is at least canonical · 2^(k - 4).

    Args:
        boxes: (left, top, right, bottom) in pixels.
        finest: k of the first map.
        count: number of maps.
        canonical: side of a box of level 4, as large as the images of ImageNet.
    """
    side = jnp.sqrt(area(boxes))
    # 1e-6 as in torchvision: a side of exactly 112 is not to fall below its boundary by rounding
    level = jnp.floor(4 + jnp.log2(side / canonical) + 1e-6)
    return (jnp.clip(level, finest, finest + count - 1) - finest).astype(jnp.int32)


def _crop(
    maps: tuple[jax.Array, ...],
    boxes: jax.Array,
    level: jax.Array,
    size: int,
    scales: tuple[float, ...],
    sampling: int,
    aligned: bool,
) -> jax.Array:
    """Crop box [B, K, 4] from map `level` [B, K]; boxes are taken in parts if the intermediate arrays are large."""
    products = max(x.shape[1] * x.shape[2] for x in maps) <= _LARGEST
    form, channels = (_products if products else _gather), maps[0].shape[-1]
    one = channels * (size * max(x.shape[2] for x in maps) if products else (2 * size * sampling) ** 2)
    part, count = max(1, _NUMBERS // (one * boxes.shape[0])), boxes.shape[1]

    def crop(box: jax.Array, at: jax.Array) -> jax.Array:
        points = _points(box * jnp.asarray(scales)[at][..., None], size, sampling, aligned)
        return form(maps, points, at, size)

    if part >= count:
        return crop(boxes, level)
    # The backward pass of a loop would keep every part's intermediate arrays.
    crops = jax.lax.map(
        lambda both: jax.checkpoint(crop)(both[0][:, None], both[1][:, None])[:, 0],
        (boxes.swapaxes(0, 1), level.swapaxes(0, 1)),
        batch_size=part,
    )
    return crops.swapaxes(0, 1)


def _points(boxes: jax.Array, size: int, sampling: int, aligned: bool) -> tuple[jax.Array, jax.Array]:
    """Return the rows and the columns [B, K, P · S] of the points in boxes [B, K, 4] in positions of their map."""
    start, end = (corner - 0.5 * aligned for corner in (boxes[..., :2], boxes[..., 2:]))
    length = end - start if aligned else jnp.maximum(end - start, 1.0)
    bins = length / size
    first = jnp.arange(size, dtype=jnp.float32).reshape(1, 1, 1, size, 1)
    point = (jnp.arange(sampling, dtype=jnp.float32) + 0.5).reshape(1, 1, 1, 1, sampling)
    start, bins = start[..., None, None], bins[..., None, None]
    points = start + first * bins + point * (bins / sampling)
    points = points.reshape(*boxes.shape[:-1], 2, size * sampling)
    return points[..., 1, :], points[..., 0, :]


def _products(maps: tuple[jax.Array, ...], points: tuple[jax.Array, jax.Array], level: jax.Array, size: int) -> Any:
    """Crop by two dense products a map; a box has weights on its own map alone."""

    def weights(at: jax.Array, extent: int) -> jax.Array:
        """Return the share [B, K, P, extent] of every position in a bin."""
        inside = (at >= -1) & (at <= extent)
        far = jnp.abs(jnp.clip(at, 0, extent - 1)[..., None] - jnp.arange(extent).reshape(1, 1, 1, extent))
        share = jnp.maximum(1 - far, 0) * inside[..., None]
        return share.reshape(*at.shape[:-1], size, -1, extent).mean(axis=-2)

    total = None
    for number, x in enumerate(maps):
        rows, columns = (weights(at, extent).astype(x.dtype) for at, extent in zip(points, x.shape[1:3], strict=True))
        rows = rows * (level == number)[..., None, None].astype(x.dtype)
        thin = jnp.einsum("bkph,bhwc->bkpwc", rows, x)
        part = jnp.einsum("bkpwc,bkqw->bkpqc", thin, columns)
        total = part if total is None else total + part
    return total


def _gather(maps: tuple[jax.Array, ...], points: tuple[jax.Array, jax.Array], level: jax.Array, size: int) -> Any:
    """Crop by reading the two rows and two columns around each point, from all maps laid end to end."""
    extents = jnp.asarray([x.shape[1:3] for x in maps])
    starts = jnp.asarray([0, *(x.shape[1] * x.shape[2] for x in maps[:-1])]).cumsum()
    height, width = extents[level, 0], extents[level, 1]

    def around(at: jax.Array, extent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return positions and shares [B, K, P, 2 S] on both sides of points [B, K, P · S]."""
        extent = extent[..., None]
        inside = (at >= -1) & (at <= extent)
        at = jnp.clip(at, 0, extent - 1)
        low = jnp.floor(at)
        both = jnp.stack([low, jnp.minimum(low + 1, extent - 1)], axis=-1)
        share = jnp.stack([1 - (at - low), at - low], axis=-1) * inside[..., None]
        shape = (*at.shape[:-1], size, -1)
        return both.astype(jnp.int32).reshape(shape), share.reshape(shape)

    (rows, down), (columns, across) = around(points[0], height), around(points[1], width)
    samples = rows.shape[-1] / 2
    place = starts[level][..., None, None] + rows * width[..., None, None]
    place = place[..., :, None, :, None] + columns[..., None, :, None, :]  # [B, K, P, Q, 2 S, 2 S]
    share = down[..., :, None, :, None] * across[..., None, :, None, :] / samples**2
    table = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)
    read = jax.vmap(lambda rows, at: rows[at])(table, place)  # [B, K, P, Q, 2 S, 2 S, C]
    return (read * share[..., None].astype(table.dtype)).sum(axis=(-3, -2))
