"""Detectors without a network: each class's mean box, and blobs whose colour differs from the background.

They say what AP is worth: the first is what a detector gets that does not look at the image, the second what a
threshold on colour gets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.evals.scores.detection import Found, Truth

_SMALLEST = 12  # pixels of a blob
_ROUNDS = 4  # of fitting the background without what differs from it


@dataclass(frozen=True)
class MeanBoxes:
    """Each class's mean box as shares of the image, scored by the share of images that have the class."""

    boxes: np.ndarray  # float64 [C, 4]
    labels: np.ndarray  # int64 [C]: only classes with objects
    scores: np.ndarray  # float64 [C]

    def __call__(self, image: np.ndarray) -> Found:
        """Return the mean boxes, whatever the image [H, W, 3] shows."""
        height, width = image.shape[:2]
        return Found(self.boxes * [width, height, width, height], self.labels, self.scores)


def mean_boxes(truths: Sequence[Truth], sizes: Sequence[tuple[int, int]]) -> MeanBoxes:
    """Average the boxes of each class over training images of sizes (height, width).

    Raises:
        DataError: the images have no objects.
    """
    shares = [one.boxes / [width, height, width, height] for one, (height, width) in zip(truths, sizes, strict=True)]
    boxes = np.concatenate([share[~one.ignored] for share, one in zip(shares, truths, strict=True)])
    labels = np.concatenate([one.labels[~one.ignored] for one in truths])
    if not len(labels):
        raise DataError(f"{len(truths)} images without objects have no mean box")
    known = np.unique(labels)
    means = [boxes[labels == number].mean(axis=0) for number in known]
    seen = [np.mean([number in one.labels for one in truths]) for number in known]
    return MeanBoxes(np.array(means), known, np.array(seen))


@dataclass(frozen=True)
class Blobs:
    """Connected pixels that differ from a background of linearly changing colour; the class by how they fill their box.

    The share of its box that a blob fills is compared with each class's in training, as a normal distribution.
    """

    threshold: float  # distance in colour, of 0 … 255 a channel
    labels: np.ndarray  # int64 [C]
    means: np.ndarray  # float64 [C]: share of the box that is filled
    deviations: np.ndarray  # float64 [C]
    priors: np.ndarray  # float64 [C]

    def __call__(self, image: np.ndarray) -> Found:
        """Return the blobs of an image uint8 [H, W, 3]; the score is the probability of the class."""
        boxes, fills = blobs(image, self.threshold)
        if not len(boxes):
            return Found(boxes, np.zeros(0, np.int64), np.zeros(0))
        odds = np.log(self.priors / self.deviations) - ((fills[:, None] - self.means) / self.deviations) ** 2 / 2
        chances = np.exp(odds - odds.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        best = chances.argmax(axis=1)
        return Found(boxes, self.labels[best], chances.max(axis=1))


def fit_blobs(images: Iterable[tuple[np.ndarray, Truth]], threshold: float = 60.0) -> Blobs:
    """Measure how the blobs on objects of each class fill their boxes, over training images uint8 [H, W, 3].

    Raises:
        DataError: no object is a blob.
    """
    fills: dict[int, list[float]] = {}
    for image, true in images:
        boxes, shares = blobs(image, threshold)
        for box, share in zip(boxes, shares, strict=True):
            near = np.flatnonzero((np.abs(true.boxes - box) <= 3).all(axis=1))
            if len(near):
                fills.setdefault(int(true.labels[near[0]]), []).append(float(share))
    if not fills:
        raise DataError(f"no object differs from the background by {threshold:g}")
    labels = np.array(sorted(fills))
    counts = np.array([len(fills[number]) for number in labels], np.float64)
    means, deviations = (np.array([measure(fills[number]) for number in labels]) for measure in (np.mean, np.std))
    return Blobs(threshold, labels, means, np.maximum(deviations, 0.02), counts / counts.sum())


def blobs(image: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes [N, 4] of connected pixels off the background, and the share of each box that they fill [N]."""
    from scipy import ndimage  # type: ignore[import-untyped]  # scipy comes with jax

    places, count = ndimage.label(off_background(image, threshold))
    boxes, shares = list[list[int]](), list[float]()
    for number, (rows, columns) in enumerate(ndimage.find_objects(places, count), start=1):
        filled = places[rows, columns] == number
        if filled.sum() >= _SMALLEST:
            boxes.append([columns.start, rows.start, columns.stop, rows.stop])
            shares.append(float(filled.mean()))
    return np.array(boxes, np.float64).reshape(-1, 4), np.array(shares)


def off_background(image: np.ndarray, threshold: float) -> np.ndarray:
    """Return which pixels [H, W] are over `threshold` away from a colour that changes linearly across the image."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].reshape(2, -1)
    design = np.stack([np.ones(rows.size), rows / height, columns / width], axis=1)
    colours = image.reshape(-1, 3).astype(np.float64)
    edge = (rows < 2) | (rows >= height - 2) | (columns < 2) | (columns >= width - 2)
    kept = edge
    for _ in range(_ROUNDS):
        plane, *_ = np.linalg.lstsq(design[kept], colours[kept], rcond=None)
        far = np.linalg.norm(colours - design @ plane, axis=1) > threshold
        kept = edge & ~far if (edge & ~far).sum() > 16 else edge
    return np.asarray(far.reshape(height, width))
