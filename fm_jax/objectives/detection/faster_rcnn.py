"""The loss of Faster R-CNN (Ren et al. 2015): object or not and its box, for anchors; class and box, for proposals.

Batch fields: images [B, H, W, 3]; boxes [B, M, 4] in pixels; labels [B, M], 0-based; box_mask [B, M], False on padding;
weights [B] (0 for padding rows).

The four terms have the normalisers of torchvision: the two of anchors are divided by the number of sampled anchors, the
two of proposals by that of sampled proposals. Two divisors do not fit a loss that is divided once, over microbatches
and devices. But the numbers are quotas: an image has 256 anchors and 512 proposals whenever it has so many. So an
image's loss is (sum over its anchors) / 256 + (sum over its proposals) / 512, and a batch's is the mean over images:
torchvision's value wherever the quotas are filled. Where an image has fewer (few proposals of a small image),
torchvision divides by that fewer, over all images of one device; here each sample keeps its weight, whatever it is
batched with, so accumulation and any number of devices give the same gradient.

Dims: B batch, M objects, A anchors, K proposals, N candidates = K + M, S samples, C classes with the background.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.core.statistics import apply_with
from fm_jax.core.types import Batch, Loss, LossFn, Params
from fm_jax.ops import boxes as ops

_PLAIN = (1.0, 1.0, 1.0, 1.0)  # weights of an anchor's deltas
_UNIT = (0.0, 0.0, 1.0, 1.0)  # a box in place of one that does not count


@dataclass(frozen=True)
class Config:
    """Which anchors and proposals are positive, and how many of each image are sampled."""

    high: float = 0.7  # least IoU with an object of a positive anchor; each object's best anchors are positive too
    low: float = 0.3  # IoU below which an anchor is negative
    anchors: int = 256  # samples of an image
    anchor_positives: float = 0.5  # largest share of positive ones
    near: float = 0.5  # least IoU of a positive proposal; all others are negative
    proposals: int = 512  # samples of an image
    proposal_positives: float = 0.25
    beta: float = 1 / 9  # error below which the box loss is quadratic
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)  # as the model's `WEIGHTS`

    def __post_init__(self) -> None:
        """Check that values are in range."""
        check_least(self, anchors=1, proposals=1)
        if not 0 <= self.low <= self.high <= 1 or not 0 < self.near <= 1:
            raise ConfigError(
                f"low {self.low} and high {self.high} must be in [0, 1] and in order, near {self.near} in (0, 1]"
            )
        for name in ("anchor_positives", "proposal_positives"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if self.beta <= 0 or min(self.box_weights) <= 0:
            raise ConfigError(f"beta {self.beta} and box_weights {self.box_weights} must be above 0")


class Samples(NamedTuple):
    """Chosen candidates of each image; a place that could not be filled is not valid."""

    places: jax.Array  # [B, S] int32, their numbers; 0 where there is none
    positive: jax.Array  # [B, S] bool
    valid: jax.Array  # [B, S] bool


Sampler = Callable[[jax.Array, jax.Array, int, int], Samples]
"""(kinds [B, N], priorities [B, N], samples an image, largest number of positive ones) -> Samples."""


def faster_rcnn(
    apply: Callable[..., Any], cfg: Config | None = None, *, samplers: tuple[Sampler, Sampler] | None = None
) -> LossFn:
    """Make the loss: cross-entropy and smooth L1 of both stages, on samples of anchors and of proposals.

    Args:
        apply: `apply(variables, …, method=…)` of a model with the methods `regions` and `classify`
            (`models/vision/faster_rcnn.py`).
        cfg: thresholds and numbers; by default torchvision's.
        samplers: of anchors and of proposals; by default `balanced`.

    Returns:
        LossFn with the metrics "objectness", "anchor_boxes", "classes" and "boxes", the terms of the loss, "recall"
        (share of the objects that a proposal overlaps by at least `near`) and "accuracy" (of sampled proposals). In
        evaluation (no rng) the samples are those of one fixed key.
    """
    cfg = cfg or Config()
    sample_anchors, sample_proposals = samplers or (balanced, balanced)

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        first, second = jax.random.split(jax.random.key(0) if rng is None else rng)
        found, updates = apply_with(apply, params, batch["images"], rng=rng, train=True, method="regions")
        weights = batch["weights"].astype(jnp.float32)
        objects = batch["boxes"].astype(jnp.float32), batch["labels"], batch["box_mask"] & (weights > 0)[:, None]

        kinds, which, _ = match(found.anchors[None], objects[0], objects[2], cfg.high, cfg.low, best=True)
        drawn = jax.random.uniform(first, kinds.shape)
        chosen = sample_anchors(kinds, drawn, cfg.anchors, int(cfg.anchors * cfg.anchor_positives))
        terms = _anchor_terms(cfg, found, chosen, _at(objects[0], _at(which, chosen.places)))

        candidates = jnp.concatenate([found.proposals, objects[0]], axis=1)
        real = jnp.concatenate([found.valid, objects[2]], axis=1)
        kinds, which, overlap = match(candidates, objects[0], objects[2], cfg.near, cfg.near)
        drawn = _priorities(second, found.valid.shape[0], found.valid.shape[1], objects[0].shape[1])
        chosen = sample_proposals(
            jnp.where(real, kinds, -1), drawn, cfg.proposals, int(cfg.proposals * cfg.proposal_positives)
        )
        rois = jnp.where(chosen.valid[..., None], _at(candidates, chosen.places), 0.0)
        size = batch["images"].shape[1:3]
        logits, refined = apply({"params": params}, found.maps, rois, size, method="classify")
        which = _at(which, chosen.places)
        labels = jnp.where(chosen.positive, _at(objects[1], which) + 1, 0)
        terms |= _proposal_terms(cfg, chosen, logits, refined, labels, rois, _at(objects[0], which))

        covered = (overlap[:, :, : found.valid.shape[1]] * found.valid[:, None]).max(axis=-1) >= cfg.near
        right = (logits.argmax(axis=-1) == labels) & chosen.valid
        rates = {"recall": (covered & objects[2], objects[2]), "accuracy": (right, chosen.valid)}
        metrics = {name: (_total(term, weights), weights.sum()) for name, term in terms.items()}
        metrics |= {
            name: (_total(hits.sum(axis=1), weights), _total(all_.sum(axis=1), weights))
            for name, (hits, all_) in rates.items()
        }
        each = jnp.stack(list(terms.values())).sum(axis=0)
        return Loss(_total(each, weights), weights.sum(), metrics, updates)

    return loss


def match(
    boxes: jax.Array, objects: jax.Array, mask: jax.Array, high: float, low: float, *, best: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Match each box to the object that it overlaps most.

    Args:
        boxes: [B or 1, N, 4].
        objects: [B, M, 4].
        mask: [B, M] bool: False on padding.
        high: IoU from which a box is positive.
        low: IoU below which it is negative; between the two it is neither.
        best: whether boxes are positive, too, that no other overlaps an object more than, if they touch it at all. Such
            a box, too, is matched to the object that it overlaps most, which may be another one.

    Returns:
        kinds [B, N] int32, 1 (positive), 0 or -1 (neither); the objects' numbers [B, N] int32, 0 if there is no object;
        the overlaps [B, M, N], -1 for padding. No gradient flows through them.
    """
    overlap = jnp.where(mask[..., None], ops.pairwise_iou(objects, boxes), -1.0)
    # Computed once: XLA may otherwise compute it again for the comparison below, with other roundings.
    overlap = jax.lax.optimization_barrier(jax.lax.stop_gradient(overlap))
    if not objects.shape[1]:
        nothing = jnp.zeros((len(objects), boxes.shape[1]), jnp.int32)
        return nothing, nothing, overlap
    most = overlap.max(axis=1)
    kinds = jnp.where(most >= high, 1, jnp.where(most < low, 0, -1))
    if best:
        top = overlap.max(axis=2, keepdims=True)
        kinds = jnp.where(((overlap == top) & (top > 0)).any(axis=1), 1, kinds)
    return kinds.astype(jnp.int32), overlap.argmax(axis=1).astype(jnp.int32), overlap


def balanced(kinds: jax.Array, priorities: jax.Array, count: int, positives: int) -> Samples:
    """Choose the positive candidates of highest priority, at most `positives`, and negative ones up to `count`.

    With uniform priorities [B, N] these are random subsets. There are `positives + count` places an image, or fewer if
    there are fewer candidates.
    """
    candidates = kinds.shape[1]
    places = []
    for kind, most in ((1, positives), (0, count)):
        first, index = jax.lax.top_k(jnp.where(kinds == kind, priorities, -1.0), min(most, candidates))
        places.append((index, first >= 0))
    (positive, is_positive), (negative, is_negative) = places
    is_negative &= jnp.arange(negative.shape[1])[None] < count - is_positive.sum(axis=1, keepdims=True)
    valid = jnp.concatenate([is_positive, is_negative], axis=1)
    index = jnp.where(valid, jnp.concatenate([positive, negative], axis=1), 0)
    return Samples(index, valid & (jnp.arange(index.shape[1]) < positive.shape[1])[None], valid)


def _anchor_terms(cfg: Config, found: Any, chosen: Samples, objects: jax.Array) -> dict[str, jax.Array]:
    """Return the terms [B] of anchors; `objects` [B, S, 4] are those of the samples."""
    logits, target = _at(found.objectness, chosen.places), chosen.positive.astype(jnp.float32)
    entropy = jax.nn.softplus(logits) - logits * target
    boxes = _box_loss(cfg, _at(found.deltas, chosen.places), found.anchors[chosen.places], objects, chosen, _PLAIN)
    return {"objectness": _kept(entropy, chosen.valid) / cfg.anchors, "anchor_boxes": boxes / cfg.anchors}


def _proposal_terms(
    cfg: Config,
    chosen: Samples,
    logits: jax.Array,
    refined: jax.Array,
    labels: jax.Array,
    rois: jax.Array,
    objects: jax.Array,
) -> dict[str, jax.Array]:
    """Return the terms [B] of proposals; only the deltas of the object's class are trained."""
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    deltas = jnp.take_along_axis(refined, labels[..., None, None], axis=2)[:, :, 0]
    boxes = _box_loss(cfg, deltas, rois, objects, chosen, cfg.box_weights)
    return {"classes": _kept(entropy, chosen.valid) / cfg.proposals, "boxes": boxes / cfg.proposals}


def _box_loss(
    cfg: Config,
    deltas: jax.Array,
    boxes: jax.Array,
    objects: jax.Array,
    chosen: Samples,
    weights: tuple[float, float, float, float],
) -> jax.Array:
    """Return the smooth L1 loss [B] of the deltas [B, S, 4] from boxes to objects, over positive samples."""
    positive, unit = chosen.positive[..., None], jnp.asarray(_UNIT).reshape(1, 1, 4)
    target = ops.encode(jnp.where(positive, objects, unit), jnp.where(positive, boxes, unit), weights)
    error = jnp.abs(deltas - jax.lax.stop_gradient(target))
    smooth = jnp.where(error < cfg.beta, 0.5 * error**2 / cfg.beta, error - 0.5 * cfg.beta)
    return _kept(smooth.sum(axis=-1), chosen.positive)


def _priorities(key: jax.Array, batch: int, proposals: int, objects: int) -> jax.Array:
    """Draw a number for each candidate [B, K + M]; an object's does not depend on how many rows are padded."""
    first, second = jax.random.split(key)
    keys = jax.vmap(lambda row: jax.random.fold_in(second, row))(jnp.arange(objects))
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (batch,)))(keys)
    return jnp.concatenate([jax.random.uniform(first, (batch, proposals)), drawn.reshape(objects, batch).T], axis=1)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Return the rows `index` [B, S] of values [B, N, …]: [B, S, …]; zeros if N is 0."""
    if not values.shape[1]:
        return jnp.zeros((*index.shape, *values.shape[2:]), values.dtype)
    return jax.vmap(lambda rows, at: rows[at])(values, index)


def _kept(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the sum [B] of values [B, S] where the mask is true."""
    return jnp.where(mask, values, 0.0).sum(axis=1)


def _total(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted sum [] of values [B]; a value of weight 0 may be anything, even nan."""
    return jnp.where(weights > 0, values * weights, 0.0).sum()
