"""YOLOv3's loss (Redmon & Farhadi 2018, sections 2.1 to 2.3), as Darknet computes it.

Batch fields: images [B, H, W, C], boxes [B, M, 4] (left, top, right, bottom in pixels), labels [B, M], box_mask [B, M]
(False for padding), weights [B] (0 for padding rows).

The paper says it in words, and Darknet (src/yolo_layer.c) is what its numbers come from. Where they differ, this is
Darknet:
- A box belongs to one candidate: of all anchors of all scales the one whose shape overlaps most, in the centre's cell.
- Any other candidate should predict "no object", unless its *predicted* box overlaps a box by more than `ignore`. (In
  the paper the anchor's box, by more than 0.5; Darknet's files for YOLOv3 have 0.7.)
- Centre: cross-entropy of sigmoid(tx) and the place in the cell, for Darknet's gradient is target - sigmoid(tx). Size:
  half the squared error of tw and log(width / anchor). Both are multiplied by 2 - the box's share of the image.
- Classes: an independent cross-entropy each. If two boxes belong to one candidate, the last gives its place, and all of
  them its classes.
Darknet prints a sum of squares instead; the gradients are those of the loss here.

Dims: B images, M boxes of an image (padded), N candidates, K classes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.core.statistics import apply_with
from fm_jax.core.types import Batch, Loss, LossFn, Params
from fm_jax.ops.anchor_grid import Anchors, decode, grid, match
from fm_jax.ops.boxes import iou, pairwise_iou


def yolov3(apply: Callable[..., Any], *, strides: Sequence[int], anchors: Anchors, ignore: float = 0.7) -> LossFn:
    """Make the loss of a detector whose `apply(variables, images, …)` gives (boxes, objectness, classes).

    These are logits [B, N, 4], [B, N] and [B, N, K], numbered as in `ops/anchor_grid.py`. The loss of an image is the
    sum over its candidates, and the mean over images weighs them by weights [B]. Padded boxes change no bit of it.

    Args:
        apply: the model's.
        strides: side in pixels of each scale's cells.
        anchors: (width, height) in pixels of each scale's anchors.
        ignore: IoU with a box above which a candidate is not told that it shows no object.

    Returns:
        LossFn with the metrics "box", "objectness" and "class" (per weighted image; their sum is the loss), and "iou"
        (of the assigned candidates' predictions) and "recall" (share of them with an IoU above 0.5), per candidate.

    Raises:
        ConfigError: `ignore` is not in (0, 1].
    """
    if not 0 < ignore <= 1:
        raise ConfigError(f"ignore must be above 0 and at most 1, not {ignore}")

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        outputs, updates = apply_with(apply, params, batch["images"], rng=rng)
        size = (batch["images"].shape[1], batch["images"].shape[2])
        truth = (batch["boxes"].astype(jnp.float32), batch["labels"], batch["box_mask"])
        one = partial(_image, size=size, strides=strides, anchors=anchors, ignore=ignore)
        terms = jax.vmap(one)(tuple(outputs), truth)
        weights = batch["weights"].astype(jnp.float32)
        weight = weights.sum()
        metrics = {
            name: (_total(value, weights), weight)
            for name, value in (("box", terms.box), ("objectness", terms.objectness), ("class", terms.classes))
        }
        found = _total(terms.found, weights)
        metrics |= {"iou": (_total(terms.overlap, weights), found), "recall": (_total(terms.recalled, weights), found)}
        objective = _total(terms.box + terms.objectness + terms.classes, weights)
        return Loss(objective, weight, metrics, updates)

    return loss


class _Terms(NamedTuple):
    """Sums over the candidates of one image, []."""

    box: jax.Array
    objectness: jax.Array
    classes: jax.Array
    found: jax.Array  # number of candidates to which boxes belong
    overlap: jax.Array  # sum of their predictions' IoU
    recalled: jax.Array  # number of them with an IoU above 0.5


def _image(
    outputs: tuple[jax.Array, jax.Array, jax.Array],
    truth: tuple[jax.Array, jax.Array, jax.Array],
    *,
    size: tuple[int, int],
    strides: Sequence[int],
    anchors: Anchors,
    ignore: float,
) -> _Terms:
    """Return the terms of one image: predictions [N, …] against boxes [M, 4], labels [M] and mask [M]."""
    (offsets, objectness, classes), (boxes, labels, mask) = outputs, truth
    there = mask & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes = jnp.where(there[:, None], boxes, 0.0)
    found = match(boxes, size, strides, anchors)
    predicted = jax.lax.stop_gradient(decode(offsets, grid(size, strides, anchors)))

    # Values of boxes are put at their candidate and summed there, so that the order of a sum does not depend on M.
    # Candidate N, which does not exist, takes what has none.
    count = len(objectness)
    place = jnp.where(there, found.candidate, count)

    def at_candidates(values: jax.Array) -> jax.Array:
        return jnp.zeros(count + 1, values.dtype).at[place].add(values)[:count]

    positive = jnp.zeros(count + 1, bool).at[place].set(True)[:count]
    number = jnp.arange(len(boxes))
    together = (place[:, None] == place[None]) & there[None]  # [M, M], boxes of the same candidate
    last = there & (number == jnp.where(together, number[None], -1).max(axis=1, initial=-1))

    overlaps = jnp.where(there[None], pairwise_iou(predicted, boxes), 0.0).max(axis=1, initial=0.0)
    told = positive | ~(overlaps > ignore)
    objects = jnp.where(told, _cross_entropy(objectness, positive.astype(jnp.float32)), 0.0)

    theirs = offsets[found.candidate]  # [M, 4]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centre = _cross_entropy(theirs[:, :2], found.centre).sum(axis=-1)
    sides = 0.5 * jnp.square(theirs[:, 2:] - found.size).sum(axis=-1)
    shape = (2.0 - area / math.prod(size)) * (centre + sides)

    named = jax.nn.one_hot(labels, classes.shape[-1], dtype=bool)
    target = (together[..., None] & named[None]).any(axis=1).astype(jnp.float32)  # [M, K]
    kinds = _cross_entropy(classes[found.candidate], target).sum(axis=-1)

    overlap = iou(predicted[found.candidate], boxes)
    assigned = {"box": shape, "classes": kinds, "found": jnp.ones(len(boxes)), "overlap": overlap}
    assigned["recalled"] = (overlap > 0.5).astype(jnp.float32)
    sums = {name: at_candidates(jnp.where(last, values, 0.0)).sum() for name, values in assigned.items()}
    return _Terms(objectness=objects.sum(), **sums)


def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Return the binary cross-entropy of sigmoid(logits) and a target in [0, 1], in nats."""
    return jax.nn.softplus(logits) - target * logits


def _total(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted sum [] of values [B]; a value of weight 0 may be anything, even nan."""
    return jnp.where(weights > 0, values * weights, 0.0).sum()
