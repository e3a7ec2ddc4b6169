"""Anchors of a feature pyramid, and the proposals that a region proposal network makes of them (Ren et al. 2015).

Every shape is fixed, so that all images of one size share one program: places without a box are marked.

Dims: B batch, A anchors of all levels, L levels, R ratios, K proposals.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.ops import boxes as ops

_SHORTEST = 1e-3  # pixels of a proposal's sides


class Proposals(NamedTuple):
    """Boxes that may hold an object, best first."""

    boxes: jax.Array  # [B, K, 4] pixels; zeros where there is none
    valid: jax.Array  # [B, K] bool


def anchors(
    shapes: Sequence[tuple[int, int]], image: tuple[int, int], sizes: Sequence[float], ratios: Sequence[float]
) -> jax.Array:
    """Return the anchors [A, 4] of maps laid over an image: by level, row, column and ratio.

    As in torchvision, corners are rounded to whole pixels around a position, a position is the top left corner of
    what it covers (not the middle), and anchors that leave the image are kept; the paper trains without these.

    Args:
        shapes: (height, width) of each map.
        image: (height, width) in pixels.
        sizes: of each map's anchors: the root of their area.
        ratios: height / width.
    """
    found = []
    root = np.sqrt(np.asarray(ratios, np.float32))
    for (height, width), size in zip(shapes, sizes, strict=True):
        half = np.stack([1 / root * np.float32(size), root * np.float32(size)], axis=1) / 2  # [R, (x, y)]
        cell = np.concatenate([-half, half], axis=1).round()
        rows = jnp.arange(height, dtype=jnp.float32) * (image[0] // height)
        columns = jnp.arange(width, dtype=jnp.float32) * (image[1] // width)
        corner = jnp.stack(jnp.meshgrid(columns, rows), axis=-1)  # [H, W, (x, y)]
        found.append((jnp.tile(corner, 2)[:, :, None] + cell[None, None]).reshape(-1, 4))
    return jnp.concatenate(found)


def propose(
    scores: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    counts: Sequence[int],
    image: tuple[int, int],
    *,
    before: int,
    after: int,
    overlap: float,
) -> Proposals:
    """Return the best boxes [B, after, 4] after non-maximum suppression within each level.

    No gradient flows through them.

    Args:
        scores: [B, A] of each anchor; only their order matters.
        deltas: [B, A, 4] from the anchor to its object (`ops/boxes.py`).
        anchors: [A, 4].
        counts: number of anchors of each level; their sum is A.
        image: (height, width) to clip to, in pixels; what is then thinner than 0.001 is dropped.
        before: number of anchors of a level that are decoded, the best.
        after: K.
        overlap: IoU above which the worse of two boxes is suppressed.
    """
    scores, deltas = jax.lax.stop_gradient((scores.astype(jnp.float32), deltas.astype(jnp.float32)))
    chosen, start = list[jax.Array](), 0
    for count in counts:
        _, best = jax.lax.top_k(scores[:, start : start + count], min(before, count))
        chosen.append(best + start)
        start += count
    level = np.repeat(np.arange(len(counts)), [part.shape[1] for part in chosen])
    at = jnp.concatenate(chosen, axis=1)
    near = jnp.take_along_axis(deltas, at[..., None], axis=1)
    found = ops.clip(ops.decode(near, jnp.asarray(anchors)[at], (1.0, 1.0, 1.0, 1.0)), *image)
    solid = ((found[..., 2:] - found[..., :2]) >= _SHORTEST).all(axis=-1)
    ranks = jnp.where(solid, jnp.take_along_axis(scores, at, axis=1), -jnp.inf)
    groups = jnp.asarray(level)
    kept, valid = jax.vmap(lambda box, rank: ops.nms(box, rank, overlap, after, groups))(found, ranks)
    best = jnp.take_along_axis(found, kept[..., None], axis=1)
    return Proposals(jnp.where(valid[..., None], best, 0.0), valid)
