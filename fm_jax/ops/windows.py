"""Sliding windows over images: what each place of a window, a tap, sees.

Dims: B batch, H height, W width, C channels, H' × W' the output's map, s stride, T taps,
R × S a plane, which is every s-th row and column.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Padding = Literal["SAME", "VALID"] | Sequence[tuple[int, int]]


class Axis(NamedTuple):
    """What a sliding window does along one axis."""

    pad: tuple[int, int]
    out: int  # extent of the output
    taps: range  # places of the window that see more than padding


def axes(image: Sequence[int], window: Sequence[int], stride: int, padding: Padding) -> tuple[Axis, Axis]:
    """Return what a window (height, width) does along both axes of an image (H, W)."""
    pads = jax.lax.padtype_to_pads(image, window, (stride, stride), padding) if isinstance(padding, str) else padding
    height, width = (_axis(*each, stride) for each in zip(image, window, pads, strict=True))
    return height, width


def _axis(extent: int, side: int, pad: tuple[int, int], stride: int) -> Axis:
    out = max(0, (extent + sum(pad) - side) // stride + 1)
    # the place in the image that a tap sees at output 0 is tap - pad[0]
    seeing = [tap for tap in range(side) if any(0 <= tap - pad[0] + stride * at < extent for at in range(out))]
    return Axis(pad, out, range(seeing[0], seeing[-1] + 1) if seeing else range(side))


def planes(x: jax.Array, rows: Axis, columns: Axis, stride: int, fill: float = 0.0) -> list[list[jax.Array]]:
    """Pad an image with `fill` and take every s-th row and column: [B, H, W, C] -> s times s times [B, R, S, C].

    Row r · s + a of the padded image is row r of plane [a], and so for columns. What a tap sees is then one piece of a
    plane. As a slice with a stride, its gradient would be padded between all pixels, which XLA on a CPU computes pixel
    by pixel; and the planes are split, not indexed, because the transpose of that is one concatenation.
    """
    edges = [(0, 0, 0)]
    for axis, extent in ((rows, x.shape[1]), (columns, x.shape[2])):
        needed = -(-(axis.taps.stop + stride * (axis.out - 1)) // stride) * stride
        edges.append((axis.pad[0], needed - axis.pad[0] - extent, 0))
    padded = jax.lax.pad(x, jnp.asarray(fill, x.dtype), [*edges, (0, 0, 0)])
    batch, height, width, channels = padded.shape
    if stride == 1:
        return [[padded]]
    cells = padded.reshape(batch, height // stride, stride, width // stride, stride, channels)
    ones = (1,) * stride
    return [
        [plane[:, :, 0, :, 0] for plane in jax.lax.split(part, ones, axis=4)]
        for part in jax.lax.split(cells, ones, axis=2)
    ]


def views(x: jax.Array, rows: Axis, columns: Axis, stride: int, fill: float = 0.0) -> list[jax.Array]:
    """Return what each tap sees, row by row: [B, H, W, C] -> T times [B, H', W', C]."""
    parts = planes(x, rows, columns, stride, fill)

    def view(row: int, column: int) -> jax.Array:
        (down, top), (right, left) = divmod(row, stride), divmod(column, stride)
        return parts[top][left][:, down : down + rows.out, right : right + columns.out]

    return [view(row, column) for row in rows.taps for column in columns.taps]


def shifts(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> tuple[list[jax.Array], jax.Array]:
    """Return what each tap of a kernel [h, w, …] sees, T times [B, H', W', C], and the kernel [h', w', …], h' · w' = T.

    Taps at the kernel's edges that see nothing but padding are left out: on a map of 1×1 one of 3×3 remains.
    """
    rows, columns = axes(x.shape[1:3], kernel.shape[:2], stride, padding)
    seen = kernel[rows.taps.start : rows.taps.stop, columns.taps.start : columns.taps.stop]
    return views(x, rows, columns, stride), seen
