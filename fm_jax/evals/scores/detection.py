"""Average precision of detections by COCO's rule, in NumPy, and the confusion matrix with a background class.

Every number equals that of `pycocotools` bit for bit (a test compares them where that is installed), so the default
install scores as the field does; `coco_official.py` runs `pycocotools` itself, for a number that is to be published.

COCO's rule, for one class, one range of areas and one IoU threshold: an image's detections (the best 100 of the class)
take, best first, the free object of the largest IoU, if that is at least the threshold. A detection that takes an
object is a true positive, another one a false positive. An object is ignored if it is a crowd or outside the range; it
is taken only where no other object can be, and the detection then counts as neither. A crowd may be taken by any number
of detections, and its IoU is the share of the detection inside it. A detection without an object that is itself outside
the range counts as neither. AP is the mean over 101 recalls of the best precision at this recall or a higher one
(Lin et al. 2014; cocodataset.org/#detection-eval).

Legend: N objects or K detections of one image, C classes, T IoU thresholds, A ranges of areas, R recalls, L limits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fm_jax.core.errors import DataError

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
LIMITS = (1, 10, 100)  # detections of one class in one image
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


class Truth(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # float [N, 4]: left, top, right, bottom in pixels of the image
    labels: np.ndarray  # integers [N]
    ignored: np.ndarray  # bool [N]: a crowd (COCO) or a difficult object (VOC), treated as the rule says
    areas: np.ndarray  # float [N]: of the object's mask if there is one, else of its box


class Found(NamedTuple):
    """The detections of one image, in any order."""

    boxes: np.ndarray  # float [K, 4]
    labels: np.ndarray  # integers [K]
    scores: np.ndarray  # float [K]


def truth(
    boxes: np.ndarray, labels: np.ndarray, ignored: np.ndarray | None = None, areas: np.ndarray | None = None
) -> Truth:
    """Return the objects of an image; by default none is ignored, and areas are those of the boxes."""
    edges = np.asarray(boxes, np.float64).reshape(-1, 4)
    _, _, width, height = corners(edges)
    return Truth(
        edges,
        np.asarray(labels, np.int64),
        np.zeros(len(edges), bool) if ignored is None else np.asarray(ignored, bool),
        width * height if areas is None else np.asarray(areas, np.float64),
    )


def corners(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return left, top, width and height [N] in float64, COCO's form, of boxes [N, 4]."""
    left, top, right, bottom = np.asarray(boxes, np.float64).reshape(-1, 4).T
    return left, top, right - left, bottom - top


def overlaps(found: np.ndarray, boxes: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    """Return the IoU [K, N] of detections [K, 4] and objects [N, 4]; for an ignored object [N], the share inside it.

    Computed in float64 from left, top, width and height in the order of `pycocotools`: an IoU at a threshold then falls
    on the same side.
    """
    a, b = ([part[:, None] for part in corners(found)], [part[None] for part in corners(boxes)])
    wide = np.minimum(a[0] + a[2], b[0] + b[2]) - np.maximum(a[0], b[0])
    high = np.minimum(a[1] + a[3], b[1] + b[3]) - np.maximum(a[1], b[1])
    shared = np.where((wide > 0) & (high > 0), wide * high, 0.0)
    own, other = a[2] * a[3], b[2] * b[3]
    whole = own + other - shared
    if ignored is not None:
        whole = np.where(ignored[None], own, whole)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


@dataclass(frozen=True)
class Coco:
    """COCO's tables; -1 where a class has no object that counts."""

    precision: np.ndarray  # float64 [T, R, C, A, L]
    recall: np.ndarray  # float64 [T, C, A, L]: the highest

    def summary(self) -> dict[str, float]:
        """Return COCO's twelve numbers: means over the classes that have objects, -1 if none has."""
        ap, ar = self._ap, self._ar
        return {
            "ap": ap(),
            "ap50": ap(threshold=0),
            "ap75": ap(threshold=5),
            "ap_small": ap("small"),
            "ap_medium": ap("medium"),
            "ap_large": ap("large"),
            "ar1": ar(limit=1),
            "ar10": ar(limit=10),
            "ar100": ar(),
            "ar_small": ar("small"),
            "ar_medium": ar("medium"),
            "ar_large": ar("large"),
        }

    def by_class(self) -> np.ndarray:
        """Return the AP of each class [C], the mean over the ten thresholds; -1 for a class without objects."""
        return np.array([_mean(self.precision[:, :, number, 0, -1]) for number in range(self.precision.shape[2])])

    def curves(self, threshold: int = 0) -> np.ndarray:
        """Return the precision [C, R] at `RECALLS` for one of `THRESHOLDS`; -1 for a class without objects."""
        return self.precision[threshold, :, :, 0, -1].T

    def _ap(self, area: str = "all", *, threshold: int | None = None) -> float:
        table = self.precision[:, :, :, list(AREAS).index(area), -1]
        return _mean(table if threshold is None else table[threshold])

    def _ar(self, area: str = "all", *, limit: int = LIMITS[-1]) -> float:
        return _mean(self.recall[:, :, list(AREAS).index(area), LIMITS.index(limit)])


def coco(truths: Sequence[Truth], found: Sequence[Found], num_classes: int) -> Coco:
    """Score the detections of all images, `found[i]` on `truths[i]`, with classes 0 … num_classes - 1.

    Of equal scores the earlier detection, and the earlier image, comes first.

    Raises:
        DataError: as `check`.
    """
    check(truths, found, num_classes)
    precision = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS), len(LIMITS)), -1.0)
    recall = np.full((len(THRESHOLDS), num_classes, len(AREAS), len(LIMITS)), -1.0)
    parts: list[list[_Matched]] = [[] for _ in range(num_classes)]
    for true, guess in zip(truths, found, strict=True):
        for number, objects, detections in by_class(true, guess):
            parts[number].append(_match(objects, detections))
    for number, matched in enumerate(parts):
        counts = np.sum([part.objects for part in matched] or [np.zeros(len(AREAS), np.int64)], axis=0)
        for k, limit in enumerate(LIMITS):
            for area in np.flatnonzero(counts):
                curve = _curve(matched, int(area), limit, int(counts[area]))
                precision[:, :, number, area, k], recall[:, number, area, k] = curve
    return Coco(precision, recall)


def by_class(true: Truth, guess: Found) -> Iterator[tuple[int, Truth, Found]]:
    """Yield (class, its objects, its detections) of one image, for the classes that have either."""
    for number in np.union1d(true.labels, guess.labels):
        mine, theirs = true.labels == number, guess.labels == number
        yield int(number), Truth(*(part[mine] for part in true)), Found(*(part[theirs] for part in guess))


def confusion(
    truths: Sequence[Truth], found: Sequence[Found], num_classes: int, *, score: float = 0.25, iou: float = 0.5
) -> np.ndarray:
    """Return counts int64 [C + 1, C + 1]: row = class of an object, column = class of the detection on it.

    Detections of at least `score` and objects are paired whatever their classes: the pair of the largest IoU first,
    while it is at least `iou`. The last row holds detections on no object, the last column objects without a detection.
    Ignored objects count nowhere, nor does a detection without a pair of which at least `iou` lies inside one.

    Raises:
        DataError: as `check`.
    """
    check(truths, found, num_classes)
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for true, guess in zip(truths, found, strict=True):
        sure = guess.scores >= score
        labels, boxes = guess.labels[sure], guess.boxes[sure]
        shares = overlaps(boxes, true.boxes, true.ignored)
        beside = (shares[:, true.ignored] >= iou).any(axis=1)
        own, shares = true.labels[~true.ignored], shares[:, ~true.ignored]
        free_found, free_true = np.ones(len(labels), bool), np.ones(len(own), bool)
        for flat in np.argsort(-shares, axis=None, kind="stable"):
            k, n = divmod(int(flat), len(own))
            if shares[k, n] < iou:
                break
            if free_found[k] and free_true[n]:
                free_found[k] = free_true[n] = False
                counts[own[n], labels[k]] += 1
        counts[:-1, -1] += np.bincount(own[free_true], minlength=num_classes)
        counts[-1, :-1] += np.bincount(labels[free_found & ~beside], minlength=num_classes)
    return counts


def check(truths: Sequence[Truth], found: Sequence[Found], num_classes: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        DataError: no images, other images than those of the truth, arrays that do not fit together, a label outside
            0 … num_classes - 1, or a box or score that is not finite; the image is named by its place.
    """
    if not truths or len(truths) != len(found):
        raise DataError(f"{len(truths)} images with objects and {len(found)} with detections cannot be scored")
    for place, (true, guess) in enumerate(zip(truths, found, strict=True)):
        for kind, arrays in (("objects", true), ("detections", guess)):
            count = len(arrays.labels)
            if arrays.boxes.shape != (count, 4) or any(len(part) != count for part in arrays):
                raise DataError(
                    f"image {place}: {kind} of shapes {[part.shape for part in arrays]} do not fit together"
                )
            wrong = arrays.labels[(arrays.labels < 0) | (arrays.labels >= num_classes)]
            if len(wrong):
                raise DataError(f"image {place}: {kind} have class {wrong[0]}, outside 0 … {num_classes - 1}")
        for kind, values in (("a box", true.boxes), ("a detected box", guess.boxes), ("a score", guess.scores)):
            if not np.isfinite(values).all():
                raise DataError(f"image {place}: {kind} is not finite: {values[~np.isfinite(values)][0]}")


class _Matched(NamedTuple):
    """The detections of one class in one image, best first, and what became of them."""

    scores: np.ndarray  # float64 [K]
    hit: np.ndarray  # bool [A, T, K]: took an object, also an ignored one
    ignored: np.ndarray  # bool [A, T, K]: counts as neither
    objects: np.ndarray  # int64 [A]: objects that count


def _match(true: Truth, guess: Found) -> _Matched:
    """Match one image's detections of one class, for all ranges and thresholds at once."""
    best = np.argsort(-guess.scores, kind="stable")[: LIMITS[-1]]
    boxes, count = guess.boxes[best], len(best)
    low, high = (np.array(side)[:, None] for side in zip(*AREAS.values(), strict=True))
    outside = true.ignored | (true.areas < low) | (true.areas > high)  # [A, N]
    hit = np.zeros((len(AREAS), len(THRESHOLDS), count), bool)
    ignored = np.zeros_like(hit)
    taken = np.zeros((len(AREAS), len(THRESHOLDS), len(true.labels)), bool)
    shares = overlaps(boxes, true.boxes, true.ignored)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    for k in np.flatnonzero((shares >= least[0]).any(axis=1)):
        fits = (shares[k] >= least) & (~taken | true.ignored)
        counted = fits & ~outside[:, None]
        choice = np.where(counted.any(axis=-1, keepdims=True), counted, fits)
        # of equal IoUs the last object, as in pycocotools
        last = np.where(choice, shares[k], -1.0)[..., ::-1].argmax(axis=-1)
        at = (len(true.labels) - 1 - last)[..., None]
        hit[..., k] = choice.any(axis=-1)
        ignored[..., k] = (
            hit[..., k] & np.take_along_axis(np.broadcast_to(outside[:, None], fits.shape), at, -1)[..., 0]
        )
        np.put_along_axis(taken, at, np.take_along_axis(taken, at, -1) | hit[..., k, None], -1)
    _, _, width, height = corners(boxes)
    beyond = (width * height < low) | (width * height > high)  # [A, K]
    ignored |= ~hit & beyond[:, None]
    return _Matched(guess.scores[best].astype(np.float64), hit, ignored, (~outside).sum(axis=1))


def _curve(parts: Sequence[_Matched], area: int, limit: int, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the precision at each recall [T, R] and the highest recall [T] of one class."""
    scores = np.concatenate([part.scores[:limit] for part in parts])
    order = np.argsort(-scores, kind="stable")
    hit, ignored = (
        np.concatenate([table[area, :, :limit] for table in tables], axis=1)[:, order]
        for tables in ([part.hit for part in parts], [part.ignored for part in parts])
    )
    right = np.cumsum(hit & ~ignored, axis=1, dtype=np.float64)
    wrong = np.cumsum(~hit & ~ignored, axis=1, dtype=np.float64)
    recall, precision = right / objects, right / (right + wrong + np.spacing(1))
    if not len(scores):
        return np.zeros((len(THRESHOLDS), len(RECALLS))), np.zeros(len(THRESHOLDS))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(precision, ((0, 0), (0, 1)))  # 0 beyond the highest recall
    places = np.stack([np.searchsorted(row, RECALLS, side="left") for row in recall])
    return np.take_along_axis(padded, places, axis=1), recall[:, -1]


def _mean(table: np.ndarray) -> float:
    """Return the mean of what is not -1; -1 if everything is."""
    values = table[table > -1]
    return float(values.mean()) if values.size else -1.0
