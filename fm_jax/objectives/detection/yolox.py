"""The loss of YOLOX (Ge et al. 2021): boxes by IoU, objectness and classes, on anchor points that SimOTA assigns.

Batch fields: images [B, H, W, C], boxes [B, M, 4] (left, top, right, bottom in pixels of the image), labels [B, M]
int32, box_mask [B, M] (False for padding, which changes nothing), weights [B] (0 for padding rows).

Dims: B images, M boxes (padded), A anchor points, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fm_jax.core.errors import ConfigError
from fm_jax.core.statistics import apply_with
from fm_jax.core.types import Batch, Loss, LossFn, Params
from fm_jax.ops import anchor_points
from fm_jax.ops.assignment import simota
from fm_jax.ops.boxes import iou

BOX_SHARE = 5.0  # weight of the IoU term; the others have 1
_UNIT = np.array([[[0, 0, 1, 1]]], np.float32)  # a box for points that answer for none


class Raw(Protocol):
    """What the detector returns."""

    boxes: jax.Array  # [B, A, 4] offsets (ops/anchor_points.py)
    objectness: jax.Array  # [B, A] logits
    classes: jax.Array  # [B, A, C] logits


def yolox(
    apply: Callable[..., Any],
    inputs: tuple[str, ...] = ("images",),
    *,
    strides: Sequence[int] = (8, 16, 32),
    l1_from: int | None = None,
) -> LossFn:
    """Make the loss of a detector's `apply(variables, *inputs, rngs=…) -> Raw`.

    With n positive anchor points in the batch it is 1/n of the sum of: 5 (1 - IoU²) and the classes' binary
    cross-entropy over the positive points, where the target of the right class is the prediction's IoU with its box;
    and the objectness' binary cross-entropy over all points. In the last epochs the paper adds the L1 distance of the
    four offsets.

    n is that of all devices and microbatches together. It is at least 1, as in the authors' code, so that a batch
    without objects learns that there are none; a microbatch without objects therefore counts as one point.

    Args:
        apply: the model.
        inputs: batch fields that the model reads; the first holds the images.
        strides: pixels between the anchor points of each feature map, finest first.
        l1_from: training step from which on the L1 term is added; None: never. Evaluation, which has no step, adds it
            unless it is None.

    Returns:
        LossFn with the metrics "iou_loss", "objectness_loss", "class_loss", "l1_loss" (as they are added up, per
        positive point; the last is measured always), "iou" (of the positive points) and "positives" (points per box).

    Raises:
        ConfigError: `l1_from` is negative.
    """
    if l1_from is not None and l1_from < 0:
        raise ConfigError(f"l1_from must be at least 0, or None for no L1 term, not {l1_from}")

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        raw, updates = apply_with(apply, params, *(batch[name] for name in inputs), rng=rng)
        _, height, width, _ = batch[inputs[0]].shape
        at = anchor_points.points(height, width, strides)
        weights, mask = batch["weights"].astype(jnp.float32), batch["box_mask"]
        terms, positive, overlap = _terms(raw, at, batch["boxes"].astype(jnp.float32), batch["labels"], mask)
        used = weights > 0
        sums = {name: jnp.where(used, term * weights, 0.0).sum() for name, term in terms.items()}
        count = jnp.where(used, positive.sum(axis=1) * weights, 0.0).sum()
        weight = jnp.where(used.any(), jnp.maximum(count, 1.0), 0.0)
        whole = sums["iou_loss"] + sums["objectness_loss"] + sums["class_loss"]
        if l1_from is not None:
            whole = whole + sums["l1_loss"] * (1.0 if step is None else jnp.where(step >= l1_from, 1.0, 0.0))
        metrics = {name: (value, weight) for name, value in sums.items()}
        metrics["iou"] = (jnp.where(used, overlap.sum(axis=1) * weights, 0.0).sum(), count)
        metrics["positives"] = (count, jnp.where(used, mask.sum(axis=1) * weights, 0.0).sum())
        return Loss(whole, weight, metrics, updates)

    return loss


def _terms(
    raw: Raw, at: anchor_points.Points, boxes: jax.Array, labels: jax.Array, mask: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Return each term's sum over an image [B], which points are positive [B, A], and their IoUs, else 0 [B, A]."""
    offsets, objectness, logits = (part.astype(jnp.float32) for part in (raw.boxes, raw.objectness, raw.classes))
    assign = jax.vmap(simota, in_axes=(0, 0, 0, None, 0, 0, 0))
    everywhere = anchor_points.decode(offsets, at)
    positive, index, overlap = assign(everywhere, logits, objectness, at, boxes, labels, mask)
    chosen = positive[..., None]
    target = jnp.where(chosen, jnp.take_along_axis(boxes, index[..., None], axis=1), _UNIT)
    offsets = jnp.where(chosen, offsets, 0.0)  # before exp: an infinity of an unused point would make its gradient NaN
    label = jnp.take_along_axis(labels, index, axis=1)
    wanted = jax.nn.one_hot(label, logits.shape[-1]) * overlap[..., None]
    per_point = {
        "iou_loss": BOX_SHARE * (1 - jnp.square(iou(anchor_points.decode(offsets, at), target))),
        "class_loss": optax.sigmoid_binary_cross_entropy(logits, wanted).sum(axis=-1),
        "l1_loss": jnp.abs(offsets - anchor_points.encode(target, at)).sum(axis=-1),
    }
    terms = {name: jnp.where(positive, values, 0.0).sum(axis=1) for name, values in per_point.items()}
    at_all = optax.sigmoid_binary_cross_entropy(objectness, positive.astype(jnp.float32))
    return terms | {"objectness_loss": at_all.sum(axis=1)}, positive, overlap
