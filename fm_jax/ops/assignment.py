"""SimOTA: which anchor points of an image answer for which of its boxes (Ge et al. 2021, "YOLOX", section 2.1).

Of a box the anchor points near its centre are candidates. Each box takes the k cheapest candidates, where k is the sum
of the ten largest IoUs of its predictions, rounded down, so a box that is predicted well takes more. A point that
several boxes want goes to the one for which it is cheapest.

The rule is that of the authors' repository today: a point is near if it is within 1.5 cells of the box's centre along
both axes. Their release 0.3.0 also took points inside the box, and others within 2.5 cells, and so trains differently.

Shapes are fixed: padding boxes cost infinity, and k is a mask over the ten cheapest.

Dims: A anchor points, M boxes (padded), C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.ops.anchor_points import Points
from fm_jax.ops.boxes import pairwise_iou

RADIUS = 1.5  # cells from a box's centre within which an anchor point is its candidate
CANDIDATES = 10  # IoUs that are added up to k, and so the most points that a box takes
FAR = 1e6  # added to the cost of a point that is a candidate of other boxes only
IOU_SHARE = 3.0  # of the IoU's cost beside the classes'
_SURE = -100.0  # least logarithm of a probability


class Assignment(NamedTuple):
    """What each anchor point has to predict."""

    positive: jax.Array  # [A] bool, whether it answers for a box
    box: jax.Array  # [A] int32, that box; 0 where none
    iou: jax.Array  # [A], IoU of its prediction with that box; 0 where none


def simota(
    predicted: jax.Array,
    logits: jax.Array,
    objectness: jax.Array,
    at: Points,
    boxes: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
) -> Assignment:
    """Assign the anchor points of one image. No gradient flows through it.

    Args:
        predicted: boxes [A, 4] that the anchor points predict, in pixels.
        logits: their classes' logits [A, C].
        objectness: their logits [A] of holding an object.
        at: where the anchor points are.
        boxes: the image's boxes [M, 4] in pixels.
        labels: their classes [M] int32.
        mask: [M] bool, False for padding, which changes no number of the result.
    """
    inputs = (predicted, logits.astype(jnp.float32), objectness.astype(jnp.float32))
    predicted, logits, objectness = jax.lax.stop_gradient(inputs)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    away = jnp.abs(middle[:, None] - at.centre[None]).max(axis=-1)
    near = (away < RADIUS * at.stride.T) & mask[:, None]
    candidate = near.any(axis=0)
    possible = candidate[None] & mask[:, None]
    iou = jnp.where(possible, pairwise_iou(boxes, predicted), 0.0)
    cost = _class_cost(logits, objectness, labels) - IOU_SHARE * jnp.log(iou + 1e-8) + jnp.where(near, 0.0, FAR)
    cost = jnp.where(possible, cost, jnp.inf)
    taken = _cheapest(cost, iou)
    contested = taken.sum(axis=0) > 1
    cheapest = jnp.arange(len(boxes))[:, None] == cost.argmin(axis=0)[None]
    taken = jnp.where(contested[None], cheapest, taken)
    positive = taken.any(axis=0)
    box = taken.argmax(axis=0).astype(jnp.int32)
    return Assignment(positive, box, jnp.where(taken, iou, 0.0).max(axis=0))


def _class_cost(logits: jax.Array, objectness: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy [M, A] of each box's class, one-hot, and the geometric mean of both probabilities."""
    p = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(objectness)[:, None])
    yes, no = (jnp.maximum(log_p, _SURE) for log_p in (jnp.log(p), jnp.log1p(-p)))
    return (no - yes).T[labels] - no.sum(axis=1)[None]


def _cheapest(cost: jax.Array, iou: jax.Array) -> jax.Array:
    """Return [M, A] bool: the k cheapest candidates of each box, where its IoUs [M, A] say how many."""
    most = min(CANDIDATES, cost.shape[1])
    number = jnp.maximum(jax.lax.top_k(iou, most)[0].sum(axis=1).astype(jnp.int32), 1)
    best, places = jax.lax.top_k(-cost, most)
    chosen = (jnp.arange(most)[None] < number[:, None]) & jnp.isfinite(best)
    rows = jnp.arange(len(cost))[:, None]
    return jnp.zeros(cost.shape, bool).at[rows, places].set(chosen)
