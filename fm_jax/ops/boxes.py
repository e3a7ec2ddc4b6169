"""Boxes in images: overlap, clipping, the deltas that detectors predict, and suppression of duplicates.

A box is (left, top, right, bottom) in pixels between pixels, y down: the pixel of row i and column j covers x from j to
j + 1 and y from i to i + 1. A side that is negative counts as zero, so an inverted box has no area.

Dims: B images, N and M boxes, K boxes that are kept.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

CLAMP = math.log(1000 / 16)
"""Largest predicted log of a size ratio: a box of 16 pixels may grow to 1000 (Girshick et al., Detectron)."""

_BLOCK = 128  # boxes that `nms` decides on at once
_LEAST = 1e-6  # pixels: the least side whose logarithm is taken
_Four = tuple[float, float, float, float]


class Detections(NamedTuple):
    """Objects found in a batch of images, best first; where `valid` is False the other fields mean nothing."""

    boxes: jax.Array  # [B, K, 4]
    scores: jax.Array  # [B, K]
    classes: jax.Array  # int32 [B, K]
    valid: jax.Array  # bool [B, K]


def area(boxes: jax.Array) -> jax.Array:
    """Return the area of boxes: [..., 4] -> [...]."""
    return _area(boxes[..., :2], boxes[..., 2:])


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the intersection over union of each box and its partner: [..., 4], [..., 4] -> [...]; they broadcast.

    Two boxes without area have 0.
    """
    shared, union = _shared(a, b)
    return _ratio(shared, union)


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the intersection over union of every pair: [..., N, 4], [..., M, 4] -> [..., N, M]."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the generalised IoU of each box and its partner: [..., 4], [..., 4] -> [...], in -1 to 1.

    It is the IoU less the share of the smallest box around both that neither covers, so it has a gradient where boxes
    are disjoint. Source: Rezatofighi et al. 2019, algorithm 1.
    """
    shared, union = _shared(a, b)
    hull = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return _ratio(shared, union) - _ratio(hull - union, hull)


def clip(boxes: jax.Array, height: jax.Array | float, width: jax.Array | float) -> jax.Array:
    """Clip boxes [..., 4] to images of a size; height and width broadcast to [...], so give [B, 1] for [B, N]."""
    right, bottom = (jnp.broadcast_to(jnp.asarray(side, boxes.dtype), boxes.shape[:-1]) for side in (width, height))
    return jnp.clip(boxes, 0, jnp.stack([right, bottom, right, bottom], axis=-1))


def to_centre(boxes: jax.Array) -> jax.Array:
    """Convert (left, top, right, bottom) to (centre x, centre y, width, height): [..., 4] -> [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def from_centre(boxes: jax.Array) -> jax.Array:
    """Convert (centre x, centre y, width, height) to (left, top, right, bottom): [..., 4] -> [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def encode(boxes: jax.Array, anchors: jax.Array, weights: _Four = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """Return the deltas that turn anchors [..., 4] into boxes [..., 4]: [..., 4].

    They are the shift of the centre in sides of the anchor and the logarithm of the ratio of the sides, times the
    weights. Sides below a millionth of a pixel count as that, so the deltas of padding are finite. Source: Ren et al.
    2015, equation 2.
    """
    box, anchor = to_centre(boxes), to_centre(anchors)
    sides = jnp.maximum(anchor[..., 2:], _LEAST)
    shift = (box[..., :2] - anchor[..., :2]) / sides
    growth = jnp.log(jnp.maximum(box[..., 2:], _LEAST) / sides)
    deltas = jnp.concatenate([shift, growth], axis=-1)
    return deltas * jnp.broadcast_to(jnp.asarray(weights, deltas.dtype), deltas.shape)


def decode(deltas: jax.Array, anchors: jax.Array, weights: _Four = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """Return the boxes that deltas make of anchors, the inverse of `encode`: [..., 4], [..., 4] -> [..., 4].

    The logarithm of a ratio of sides is at most CLAMP. Deltas and anchors broadcast.
    """
    deltas = deltas / jnp.broadcast_to(jnp.asarray(weights, deltas.dtype), deltas.shape)
    anchor = to_centre(anchors)
    centre = anchor[..., :2] + deltas[..., :2] * anchor[..., 2:]
    sides = anchor[..., 2:] * jnp.exp(jnp.minimum(deltas[..., 2:], CLAMP))
    return from_centre(jnp.concatenate([centre, sides], axis=-1))


def nms(
    boxes: jax.Array, scores: jax.Array, threshold: float, limit: int, groups: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Keep the best boxes, and drop each box that overlaps a better one that is kept (non-maximum suppression).

    Boxes are taken by falling score, those of equal score in their given order. The sorted boxes are decided block by
    block against what was kept so far, so time and memory grow with N × limit, and it stops after `limit` boxes or the
    last candidate. For a batch, use `jax.vmap`.

    Args:
        boxes: [N, 4].
        scores: [N]; a box of score -inf or NaN is no candidate.
        threshold: a box is dropped if its IoU with a better one is larger than this.
        limit: K, the number of boxes to keep at most.
        groups: int [N]; boxes of different groups (classes, pyramid levels) do not suppress each other. None: all do.

    Returns:
        Indices of the kept boxes, best first, int32 [K], and which of them are boxes, bool [K]; the others are 0.
    """
    count, block = len(boxes), max(1, min(_BLOCK, len(boxes)))
    candidate = scores > -jnp.inf  # False for NaN
    order = jnp.argsort(jnp.where(candidate, -scores, jnp.inf), stable=True).astype(jnp.int32)
    blocks = -(-count // block)

    def cut(values: jax.Array) -> jax.Array:
        """Sort by score and cut into blocks, filled with zeros: [N, …] -> [blocks, block, …]."""
        values = jnp.pad(values[order], [(0, blocks * block - count)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(blocks, block, *values.shape[1:])

    group = jnp.zeros(count, jnp.int32) if groups is None else groups
    sorted_blocks = _Block(cut(boxes), cut(group), cut(candidate), cut(jnp.arange(count, dtype=jnp.int32)))
    empty = _Block(
        jnp.zeros((limit, 4), boxes.dtype), jnp.zeros(limit, group.dtype), jnp.zeros(limit, bool),
        jnp.zeros(limit, jnp.int32),
    )  # fmt: skip

    def more(state: tuple[jax.Array, jax.Array, _Block]) -> jax.Array:
        step, kept, _ = state
        return (step < blocks) & (kept < limit) & sorted_blocks.alive[jnp.minimum(step, blocks - 1), 0]

    def decide(state: tuple[jax.Array, jax.Array, _Block]) -> tuple[jax.Array, jax.Array, _Block]:
        step, kept, chosen = state
        block = jax.tree.map(lambda values: values[step], sorted_blocks)
        alive = block.alive & ~(_rivals(chosen, block, threshold) & chosen.alive[:, None]).any(0)
        alive = _greedy(alive, _rivals(block, block, threshold))
        place = jnp.where(alive, kept + jnp.cumsum(alive) - 1, limit)  # what lies beyond `limit` is dropped
        block = block._replace(alive=alive)
        chosen = jax.tree.map(lambda old, new: old.at[place].set(new, mode="drop"), chosen, block)
        return step + 1, kept + alive.sum(dtype=jnp.int32), chosen

    if not blocks:
        return empty.number, empty.alive
    _, _, chosen = jax.lax.while_loop(more, decide, (jnp.int32(0), jnp.int32(0), empty))
    return chosen.number, chosen.alive


class _Block(NamedTuple):
    boxes: jax.Array  # [N, 4]
    group: jax.Array  # [N]
    alive: jax.Array  # bool [N]
    number: jax.Array  # int32 [N], in the order of the caller


def _rivals(a: _Block, b: _Block, threshold: float) -> jax.Array:
    """Return which boxes of `a` [N] would suppress which of `b` [M]: bool [N, M]."""
    return (pairwise_iou(a.boxes, b.boxes) > threshold) & (a.group[:, None] == b.group[None])


def _greedy(alive: jax.Array, rivals: jax.Array) -> jax.Array:
    """Return which of sorted boxes remain when each that remains suppresses its later rivals: bool [N], [N, N] -> [N].

    The rule is applied to all boxes at once until nothing changes. The first i boxes are right after i rounds, so the
    result is that of one box after the other; the number of rounds is the length of the longest chain of rivals.
    """
    rivals = jnp.triu(rivals, 1)

    def apply(remains: jax.Array) -> jax.Array:
        return alive & ~(rivals & remains[:, None]).any(0)

    def changed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] != state[1]).any()

    start = (alive, apply(alive))
    return jax.lax.while_loop(changed, lambda state: (state[1], apply(state[1])), start)[1]


def _area(low: jax.Array, high: jax.Array) -> jax.Array:
    sides = jnp.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]


def _shared(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the areas of the intersection and of the union."""
    shared = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    return shared, area(a) + area(b) - shared


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Divide; 0 where the whole is 0, without a NaN in the gradient."""
    some = whole > 0
    return jnp.where(some, part / jnp.where(some, whole, 1), 0)
