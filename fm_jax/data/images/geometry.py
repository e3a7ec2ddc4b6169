"""Where geometric operations move points, boxes and masks.

Coordinates (x, y) are in pixels from the image's top left corner, between pixels: the pixel of row i and column j
covers x from j to j + 1 and y from i to i + 1, and its centre is (j + 0.5, i + 0.5). Boxes are (left, top, right,
bottom). Every function takes the moves in the order in which they were made.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fm_jax.core.errors import DataError


class Move(NamedTuple):
    """An affine map of coordinates from an image to the next, and that one's size: what lies outside it is lost."""

    matrix: np.ndarray  # float64 [2, 3]: old (x, y, 1) -> new (x, y)
    size: tuple[int, int]  # height and width of the new image


Moved = tuple[np.ndarray, Move]
"""What a geometric operation returns: the new image and how it was made from the old one."""

_Polygon = list[tuple[float, float]]


def still(image: np.ndarray) -> Move:
    """Return the move of an image that stays as it is."""
    return along_axes(image.shape[:2])


def along_axes(
    size: Sequence[int], scale: tuple[float, float] = (1.0, 1.0), shift: tuple[float, float] = (0.0, 0.0)
) -> Move:
    """Return the move to scale × (x, y) + shift, into an image of `size` (height, width)."""
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]], np.float64)
    return Move(matrix, (int(size[0]), int(size[1])))


def resize(old: Sequence[int], new: Sequence[int], box: tuple[float, float, float, float] | None = None) -> Move:
    """Return the move of an image of size `old` (height, width), or of a box of it, to size `new`."""
    left, top, right, bottom = box or (0, 0, old[1], old[0])
    across, down = new[1] / (right - left), new[0] / (bottom - top)
    return along_axes(new, (across, down), (-left * across, -top * down))


def mirror(size: Sequence[int]) -> Move:
    """Return the move that swaps left and right of an image of `size` (height, width)."""
    return along_axes(size, (-1.0, 1.0), (float(size[1]), 0.0))


def letterbox(old: Sequence[int], new: Sequence[int]) -> Move:
    """Return the move of an image of size `old` (height, width) that fits it whole into the top left of size `new`.

    Both sides are scaled by about the same ratio, each by the exact one of its rounded length.
    """
    ratio = min(new[0] / old[0], new[1] / old[1])
    return _corner(old, ratio, new)


def short_side(old: Sequence[int], new: Sequence[int], short: float, long: float) -> Move:
    """Return the move that scales the shorter side to `short`, or the longer one to `long` if that is less.

    The image is then in the top left of size `new`, and smaller if it would not fit in it (Ren et al. 2015, section
    3.3).
    """
    ratio = min(short / min(old), long / max(old), new[0] / old[0], new[1] / old[1])
    return _corner(old, ratio, new)


def content(old: Sequence[int], move: Move) -> tuple[int, int]:
    """Return height and width that an image of size `old` (height, width) has after a move along the axes."""
    return round(float(old[0] * move.matrix[1, 1])), round(float(old[1] * move.matrix[0, 0]))


def restore(corners: np.ndarray, moves: Sequence[Move], old: Sequence[int]) -> np.ndarray:
    """Move boxes [N, 4] back into the first image, of size `old` (height, width), and clip them: float64 [N, 4].

    It inverts `boxes` where nothing was lost and nothing was turned, as after `letterbox` and `short_side`.
    """
    back = np.linalg.inv(np.vstack([compose(moves), (0.0, 0.0, 1.0)]))
    low, high = (_floats(corners, 4, "boxes")[:, side : side + 2] @ back[:2, :2].T + back[:2, 2] for side in (0, 2))
    limit = np.array([old[1], old[0]], np.float64)
    return np.concatenate([np.clip(np.minimum(low, high), 0, limit), np.clip(np.maximum(low, high), 0, limit)], axis=1)


def compose(moves: Sequence[Move]) -> np.ndarray:
    """Return one affine map, float64 [2, 3], that does what all moves do to a point."""
    whole = np.eye(3)
    for move in moves:
        whole = np.vstack([move.matrix, (0.0, 0.0, 1.0)]) @ whole
    return whole[:2]


def points(places: np.ndarray, moves: Sequence[Move]) -> tuple[np.ndarray, np.ndarray]:
    """Move points [N, 2]; return where they are, float64 [N, 2], and which ones every image on the way shows [N]."""
    places = _floats(places, 2, "points")
    seen = np.ones(len(places), bool)
    for matrix, (height, width) in moves:
        places = places @ matrix[:, :2].T + matrix[:, 2]
        seen &= _inside(places, height, width)
    return places, seen


def boxes(corners: np.ndarray, moves: Sequence[Move]) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes [N, 4] and clip them to every image on the way.

    A turned box becomes the box around what the last image shows of it.

    Returns:
        The boxes, float64 [N, 4], zeros where nothing is left; and which share of each one's area is left, [N].
        A box without area has share 0.
    """
    corners = _floats(corners, 4, "boxes")
    moved, shares = np.zeros((len(corners), 4)), np.zeros(len(corners))
    growth = abs(float(np.linalg.det(compose(moves)[:, :2])))
    for row, (left, top, right, bottom) in enumerate(corners.tolist()):
        polygon = [(left, top), (right, top), (right, bottom), (left, bottom)]
        for move in moves:
            polygon = _clipped(_moved(polygon, move.matrix), *move.size)
        if polygon:
            xs, ys = zip(*polygon, strict=True)
            moved[row] = min(xs), min(ys), max(xs), max(ys)
            area = (right - left) * (bottom - top) * growth
            shares[row] = min(1.0, _area(polygon) / area) if area > 0 else 0.0
    return moved, shares


def mask(pixels: np.ndarray, moves: Sequence[Move], fill: int = 0) -> np.ndarray:
    """Move a mask [H, W, …] to the last image: each pixel takes the nearest old one, or `fill` where there is none."""
    if not moves:
        return pixels
    height, width = moves[-1].size
    rows, columns = np.mgrid[:height, :width] + 0.5
    places = np.stack([columns.ravel(), rows.ravel()], axis=1)
    known = np.ones(len(places), bool)
    sizes = [pixels.shape[:2], *(move.size for move in moves[:-1])]
    for move, (before, across) in zip(reversed(moves), reversed(sizes), strict=True):
        places = (places - move.matrix[:, 2]) @ np.linalg.inv(move.matrix[:, :2]).T
        known &= _inside(places, before, across)
    moved = np.full((height * width, *pixels.shape[2:]), fill, pixels.dtype)
    column, row = np.floor(places[known]).astype(int).T
    moved[known] = pixels[row, column]
    return moved.reshape(height, width, *pixels.shape[2:])


def _corner(old: Sequence[int], ratio: float, new: Sequence[int]) -> Move:
    height, width = (max(1, min(round(side * ratio), limit)) for side, limit in zip(old, new, strict=True))
    return along_axes(new, (width / old[1], height / old[0]))


def _floats(values: np.ndarray, width: int, what: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[1] != width or not np.isfinite(array).all():
        raise DataError(f"{what} must be finite numbers [N, {width}], not {list(array.shape)}")
    return array


def _inside(places: np.ndarray, height: int, width: int) -> np.ndarray:
    x, y = places.T
    inside: np.ndarray = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return inside


def _moved(polygon: _Polygon, matrix: np.ndarray) -> _Polygon:
    (a, b, c), (d, e, f) = matrix.tolist()
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in polygon]


def _clipped(polygon: _Polygon, height: int, width: int) -> _Polygon:
    """Return the part of a convex polygon inside an image (Sutherland and Hodgman 1974)."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        if polygon and min(sign * (point[axis] - limit) for point in polygon) < 0:
            polygon = list(_half(polygon, axis, float(limit), sign))
    return polygon


def _half(polygon: _Polygon, axis: int, limit: float, sign: int) -> Iterator[tuple[float, float]]:
    """Yield the corners of the part on one side of a line, along its border."""
    for before, after in zip([polygon[-1], *polygon[:-1]], polygon, strict=True):
        ahead, behind = sign * (after[axis] - limit), sign * (before[axis] - limit)
        if (ahead >= 0) != (behind >= 0):
            other = before[1 - axis] + behind / (behind - ahead) * (after[1 - axis] - before[1 - axis])
            yield (limit, other) if axis == 0 else (other, limit)
        if ahead >= 0:
            yield after


def _area(polygon: _Polygon) -> float:
    pairs = zip(polygon, [*polygon[1:], polygon[0]], strict=True)
    return abs(sum(x * after - across * y for (x, y), (across, after) in pairs)) / 2
