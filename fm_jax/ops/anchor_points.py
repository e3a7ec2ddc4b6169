"""Anchor points of a detector without anchor boxes: one for each cell of each feature map, all maps in one list.

A cell predicts one box by four numbers: its centre's offset from the cell's corner in cells, and the logarithm of its
width and height in cells (Ge et al. 2021, "YOLOX", section 2.1).

Dims: A anchor points of all maps, row by row, finest map first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import ConfigError

_LEAST = 1e-8  # of a width in cells: a box without width has a target that is finite


class Points(NamedTuple):
    """Where the anchor points are: constants of an image size."""

    cell: np.ndarray  # [A, 2] float32, column and row of the cell on its map
    stride: np.ndarray  # [A, 1] float32, pixels along a side of the cell

    @property
    def centre(self) -> np.ndarray:
        """Return the cells' centres (x, y) [A, 2] in pixels."""
        centre: np.ndarray = (self.cell + np.float32(0.5)) * self.stride
        return centre


def points(height: int, width: int, strides: Sequence[int]) -> Points:
    """Return the anchor points of images [height, width] whose feature maps have these strides.

    Raises:
        ConfigError: a stride does not divide the image.
    """
    for stride in strides:
        if height < 1 or width < 1 or height % stride or width % stride:
            raise ConfigError(
                f"images of {height} × {width} are not multiples of the stride {stride}; resize or pad them to sides "
                f"that are multiples of {max(strides)}"
            )
    cells, sides = list[np.ndarray](), list[np.ndarray]()
    for stride in strides:
        rows, columns = np.mgrid[: height // stride, : width // stride]
        cells.append(np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float32))
        sides.append(np.full((rows.size, 1), stride, np.float32))
    return Points(np.concatenate(cells), np.concatenate(sides))


def decode(offsets: jax.Array, at: Points) -> jax.Array:
    """Return the boxes (left, top, right, bottom) in pixels that offsets [..., A, 4] at anchor points mean."""
    cell, stride = _beside(offsets, at)
    centre = (offsets[..., :2] + cell) * stride
    half = jnp.exp(offsets[..., 2:]) * (stride / 2)
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def encode(boxes: jax.Array, at: Points) -> jax.Array:
    """Return the offsets [..., A, 4] that `decode` turns into boxes [..., A, 4] in pixels."""
    cell, stride = _beside(boxes, at)
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    return jnp.concatenate([centre / stride - cell, jnp.log(sides / stride + _LEAST)], axis=-1)


def _beside(x: jax.Array, at: Points) -> tuple[np.ndarray, np.ndarray]:
    """Return cells and strides with as many axes as x [..., A, 4]."""
    wide = (None,) * (x.ndim - 2)
    return at.cell[wide], at.stride[wide]
