"""Average precision of detections by the two rules of Pascal VOC, at one IoU threshold.

For one class: detections of all images, best first, each look at the object of the largest IoU in their image, free or
not. If the IoU is below the threshold, the detection is a false positive; if the object is difficult, it counts as
neither; if the object was taken before, it is a false positive; else it takes the object. (COCO's rule differs: a
detection may take its second best object, and an image has at most 100 detections of a class.)

Source: Everingham et al. 2010, sections 4.2 and 4.4, and the development kit, whose threshold is "at least 0.5" (some
Python versions have "above"). Recalls are compared exactly, as whole numbers: the kit's floating-point 0.3 is above
3 / 10.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fm_jax.evals.scores.detection import Found, Truth, by_class, check, overlaps


class Voc(NamedTuple):
    """AP of each class; NaN for a class without an object that counts."""

    points: np.ndarray  # [C], until 2009: the mean of the best precision at recalls of at least 0, 0.1, …, 1
    area: np.ndarray  # [C], since 2010: the area under the best precision at each recall or a higher one

    def summary(self) -> dict[str, float]:
        """Return the means over the classes that have objects; -1, as COCO says it, if none has."""
        known = ~np.isnan(self.area)
        names = {"voc2007": self.points, "voc2010": self.area}
        return {name: float(values[known].mean()) if known.any() else -1.0 for name, values in names.items()}


def voc(truths: Sequence[Truth], found: Sequence[Found], num_classes: int, *, threshold: float = 0.5) -> Voc:
    """Score the detections of all images, `found[i]` on `truths[i]`.

    Raises:
        DataError: as `detection.check`.
    """
    check(truths, found, num_classes)
    objects = np.zeros(num_classes, np.int64)
    looked: list[list[_Looks]] = [[] for _ in range(num_classes)]
    for place, (true, guess) in enumerate(zip(truths, found, strict=True)):
        for number, mine, theirs in by_class(true, guess):
            objects[number] += (~mine.ignored).sum()
            looked[number].append(_look(mine, theirs, threshold, place))
    pairs = [_ap(looks, int(count)) for looks, count in zip(looked, objects, strict=True)]
    return Voc(*np.array(pairs, np.float64).reshape(-1, 2).T)


class _Looks(NamedTuple):
    """The detections of one class in one image."""

    scores: np.ndarray  # [K]
    objects: np.ndarray  # int64 [K, 2]: (image, object) each looks at; -1 as object: none
    difficult: np.ndarray  # bool [K]


def _look(true: Truth, guess: Found, threshold: float, place: int) -> _Looks:
    if not len(true.labels):
        at = np.full(len(guess.labels), -1)
        difficult = np.zeros(len(at), bool)
    else:
        shares = overlaps(guess.boxes, true.boxes)
        at = shares.argmax(axis=1)
        at = np.where(shares.max(axis=1) >= threshold, at, -1)
        difficult = (at >= 0) & true.ignored[at]
    return _Looks(guess.scores, np.stack([np.full(len(at), place), at], axis=1), difficult)


def _ap(looks: Sequence[_Looks], objects: int) -> tuple[float, float]:
    """Return the AP of one class by both rules."""
    if not objects:
        return np.nan, np.nan
    scores, at, difficult = (np.concatenate(parts) for parts in zip(*looks, strict=True))
    order = np.argsort(-scores, kind="stable")
    order = order[~difficult[order]]
    at = at[order]
    first = np.zeros(len(at), bool)
    first[np.unique(at, axis=0, return_index=True)[1]] = True
    hit = first & (at[:, 1] >= 0)
    right = np.cumsum(hit)
    precision = right / np.arange(1, len(hit) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1] if len(hit) else precision
    reached = [np.searchsorted(10 * right, tenth * objects) for tenth in range(11)]  # where the recall is first reached
    points = sum(best[place] for place in reached if place < len(best)) / 11
    return float(points), float(best[hit].sum() / objects)  # recall rises by 1 / objects at every hit
