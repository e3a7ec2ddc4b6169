"""Cells and anchors of a one-stage detector: one candidate box for every anchor of every cell of every scale.

Candidates are numbered by scale (in the order given), row, column and anchor, so that the maps of a network [B, rows,
columns, anchors, …] only have to be flattened and joined. All of it is known from the image's size, before compile.

Dims: N candidates, M boxes, A anchors of a scale.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import ConfigError
from fm_jax.ops.boxes import from_centre, to_centre

Anchors = Sequence[Sequence[tuple[float, float]]]
"""(width, height) in pixels of every anchor of every scale."""


class Grid(NamedTuple):
    """Constants of every candidate, float32."""

    cells: np.ndarray  # [N, 2], column and row of its cell
    strides: np.ndarray  # [N], pixels along a cell's side
    anchors: np.ndarray  # [N, 2], width and height of its anchor in pixels


def check_size(size: tuple[int, int], strides: Sequence[int]) -> None:
    """Raise unless cells of every scale tile an image of `size` (height, width).

    Raises:
        ConfigError: a side is not a multiple of the largest stride.
    """
    if any(side < 1 or side % stride for side in size for stride in strides):
        raise ConfigError(f"sides of an image must be multiples of {max(strides)}, not {size[0]} × {size[1]}")


def grid(size: tuple[int, int], strides: Sequence[int], anchors: Anchors) -> Grid:
    """Return the candidates of an image of `size` (height, width).

    Raises:
        ConfigError: a side is not a multiple of the largest stride.
    """
    check_size(size, strides)
    cells, sides, shapes = [], [], []
    for stride, pairs in zip(strides, anchors, strict=True):
        rows, columns = np.mgrid[: size[0] // stride, : size[1] // stride]
        places = np.stack([columns, rows], axis=-1).reshape(-1, 2)
        cells.append(np.repeat(places, len(pairs), axis=0))
        sides.append(np.full(len(places) * len(pairs), stride))
        shapes.append(np.tile(np.asarray(pairs), (len(places), 1)))
    return Grid(*(np.concatenate(parts).astype(np.float32) for parts in (cells, sides, shapes)))


def decode(offsets: jax.Array, grid: Grid) -> jax.Array:
    """Return the boxes [..., N, 4] in pixels that predictions (tx, ty, tw, th) [..., N, 4] stand for.

    The centre lies inside the cell, cell + sigmoid(t); the size is anchor · exp(t) (Redmon & Farhadi 2017, section 2).
    """
    ahead = (1,) * (offsets.ndim - 2)
    cells, strides, anchors = (jnp.asarray(part).reshape(*ahead, len(part), -1) for part in grid)
    centre = (jax.nn.sigmoid(offsets[..., :2]) + cells) * strides
    return from_centre(jnp.concatenate([centre, jnp.exp(offsets[..., 2:]) * anchors], axis=-1))


class Match(NamedTuple):
    """The candidate that has to find each box, and what it should predict."""

    candidate: jax.Array  # int32 [M], number of the candidate
    centre: jax.Array  # [M, 2], of the box in its cell, in [0, 1]: what sigmoid(tx), sigmoid(ty) should be
    size: jax.Array  # [M, 2], what tw, th should be; 0 for a box without area


def match(boxes: jax.Array, size: tuple[int, int], strides: Sequence[int], anchors: Anchors) -> Match:
    """Return the best candidate for boxes [M, 4]: the anchor whose shape overlaps most, in the centre's cell.

    All anchors of all scales compete, by the IoU of both rectangles about one centre; of equal ones the first wins.
    A centre outside the image belongs to the nearest cell.
    """
    check_size(size, strides)
    counts = [len(pairs) for pairs in anchors]
    shapes = np.concatenate([np.asarray(pairs, np.float32) for pairs in anchors])
    in_scale = [size[0] // stride * (size[1] // stride) * count for stride, count in zip(strides, counts, strict=True)]
    starts = np.cumsum([0, *in_scale[:-1]])
    # of every anchor: its cells' side, the anchors that share a cell, and the candidate of its first cell
    sides, shared = np.repeat(strides, counts), np.repeat(counts, counts)
    first = np.repeat(starts, counts) + np.concatenate([np.arange(count) for count in counts])

    centred = to_centre(boxes)
    side = centred[:, 2:]
    both = jnp.minimum(side[:, None], shapes[None]).prod(axis=-1)
    best = (both / (side.prod(axis=-1, keepdims=True) + shapes.prod(axis=-1)[None] - both)).argmax(axis=-1)

    stride = jnp.asarray(sides)[best]
    place = centred[:, :2] / stride[:, None]
    columns, rows = size[1] // stride, size[0] // stride
    cell = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, jnp.stack([columns, rows], axis=-1) - 1)
    candidate = jnp.asarray(first)[best] + (cell[:, 1] * columns + cell[:, 0]) * jnp.asarray(shared)[best]
    there = (side > 0).all(axis=-1, keepdims=True)
    target = jnp.where(there, jnp.log(jnp.where(there, side, 1.0) / jnp.asarray(shapes)[best]), 0.0)
    return Match(candidate.astype(jnp.int32), jnp.clip(place - cell, 0.0, 1.0), target)
