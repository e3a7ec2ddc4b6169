"""Metrics: NumPy arrays in, one Python float or a small record out.

Legend: N examples, C classes, S seeds.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fm_jax.core.errors import DataError


class Interval(NamedTuple):
    """An estimate and its two-sided confidence limits."""

    estimate: float
    low: float
    high: float


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the share of predictions [N] equal to labels [N].

    Raises:
        DataError: empty, not 1-D, or of different lengths.
    """
    labels, predictions = _pair(labels, predictions)
    return float(np.mean(labels == predictions))


def top_k_accuracy(labels: ArrayLike, scores: ArrayLike, k: int = 5) -> float:
    """Return the share of labels [N] among the k classes with the largest scores [N, C]; on ties the first classes win.

    Raises:
        DataError: inconsistent shapes, NaN scores, labels outside 0..C-1, or k outside 1..C.
    """
    values: np.ndarray = np.asarray(scores)
    if values.ndim != 2 or not 1 <= k <= values.shape[1]:
        raise DataError(f"top-{k} accuracy needs scores [N, C] with C of at least {k}, not shape {values.shape}")
    labels, _ = _pair(labels, values[:, 0])
    _check_classes("labels", labels, values.shape[1])
    if np.isnan(values).any():
        raise DataError(f"{int(np.isnan(values).sum())} of {values.size} scores are NaN")
    own = np.take_along_axis(values, labels[:, None].astype(np.int64), axis=1)
    before = (values == own) & (np.arange(values.shape[1]) < labels[:, None])
    return float(np.mean(((values > own) | before).sum(axis=1) < k))


def macro_f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the unweighted mean over classes of F1 = 2·TP / (2·TP + FP + FN), as scikit-learn's `average="macro"`.

    The classes are those that occur in labels [N] or predictions [N]; a class that occurs in only one of them has F1 0.

    Raises:
        DataError: empty, not 1-D, or of different lengths.
    """
    labels, predictions = _pair(labels, predictions)
    classes, index = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    true, guess = index[: len(labels)], index[len(labels) :]
    hits = np.bincount(true[true == guess], minlength=len(classes))
    support = np.bincount(true, minlength=len(classes))
    guessed = np.bincount(guess, minlength=len(classes))
    return float(np.mean(2 * hits / (support + guessed)))  # the sum is TP+FN + TP+FP, and never 0


def confusion(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Return the confusion matrix of labels [N] and predictions [N]: int64 [C, C], row = label, column = prediction.

    Raises:
        DataError: empty, not 1-D, of different lengths, not integers, or outside 0..C-1.
    """
    labels, predictions = _pair(labels, predictions)
    for name, values in (("labels", labels), ("predictions", predictions)):
        _check_classes(name, values, num_classes)
    flat = labels.astype(np.int64) * num_classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Return the top-label expected calibration error, in [0, 1], with equal-width bins.

    An example's confidence is its largest probability, its prediction the class that has it. Confidences fall into
    `bins` intervals (0, 1/M], (1/M, 2/M], …, (1-1/M, 1]; the error is Σ_m (n_m / N)·|accuracy_m - mean confidence_m|.
    It is biased upwards on few examples (about 1/√n per bin), so compare only runs of the same N.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    Args:
        probabilities: [N, C], rows that sum to 1.
        labels: [N] integers.
        bins: M.

    Raises:
        DataError: inconsistent shapes, rows that do not sum to 1, labels outside 0..C-1, or bins < 1.
    """
    chances = np.asarray(probabilities, np.float64)
    if chances.ndim != 2 or not chances.size:
        raise DataError(f"probabilities must be [N, C] with N and C above 0, not of shape {chances.shape}")
    if bins < 1:
        raise DataError(f"bins must be at least 1, not {bins}")
    sums = chances.sum(axis=1)
    # `not (>=)` also catches NaN. bfloat16 softmax rows sum to 1 within about 0.01.
    if not (chances.min() >= 0 and np.abs(sums - 1).max() <= 0.02):
        raise DataError(
            f"probabilities must be at least 0 and each row must sum to 1, but sums are {sums.min():.4g} to "
            f"{sums.max():.4g} and the smallest value is {chances.min():.4g}; give softmax(logits), not logits"
        )
    labels, predictions = _pair(labels, chances.argmax(axis=1))
    _check_classes("labels", labels, chances.shape[1])
    confidence = np.minimum(chances.max(axis=1), 1.0)
    edges = np.arange(1, bins) / bins
    which = np.searchsorted(edges, confidence, side="left")  # a confidence on an edge belongs to the bin below it
    gap = np.bincount(which, weights=(labels == predictions) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def perplexity(sum_nll: float, tokens: float) -> float:
    """Return exp(sum of negative log-likelihoods in nats / number of predicted tokens); inf on overflow.

    Raises:
        DataError: a sum that is negative or NaN, or no tokens.
    """
    rate = _rate(sum_nll, tokens, "tokens")
    return math.exp(rate) if rate < 709 else math.inf


def bits_per_byte(sum_nll_nats: float, num_bytes: float) -> float:
    """Return the negative log-likelihood in bits per byte of the text, which is comparable between tokenizers.

    Args:
        sum_nll_nats: sum over all predicted tokens.
        num_bytes: UTF-8 bytes of exactly the text of those tokens.

    Raises:
        DataError: a sum that is negative or NaN, or no bytes.
    """
    return _rate(sum_nll_nats, num_bytes, "bytes") / math.log(2)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean over seeds [S] with Student's t interval, mean ± t·s/√S, s with S-1 degrees of freedom.

    Raises:
        DataError: fewer than two values (no spread), values that are not finite, or an invalid confidence.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy comes with jax

    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise DataError(f"an interval over seeds needs a 1-D array of at least two values, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise DataError(f"value {values[~np.isfinite(values)][0]} of {len(values)} seeds is not finite")
    _check_confidence(confidence)
    mean = float(values.mean())
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> Interval:
    """Return an accuracy with Wilson's score interval, which stays in [0, 1] and is valid at 0 and 1.

    It covers the choice of test examples, not the training seed.
    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Raises:
        DataError: no examples, a count outside 0..total, or an invalid confidence.
    """
    if total < 1 or not 0 <= correct <= total:
        raise DataError(f"{correct} correct of {total} is not an accuracy; give total >= 1 and 0 <= correct <= total")
    _check_confidence(confidence)
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), correct / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # At 0 and 1 the limit is exact; rounding would miss it by 1e-18.
    return Interval(p, 0.0 if correct == 0 else middle - half, 1.0 if correct == total else middle + half)


def _pair(labels: ArrayLike, predictions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape or not labels.size:
        raise DataError(
            f"labels and predictions must both be [N] with N above 0, not of shapes {labels.shape} and "
            f"{predictions.shape}"
        )
    return labels, predictions


def _check_classes(name: str, values: np.ndarray, num_classes: int) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"{name} must be integers, not {values.dtype}")
    if values.min() < 0 or values.max() >= num_classes:
        raise DataError(f"{name} are {values.min()} to {values.max()}, outside 0 … {num_classes - 1}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must be between 0 and 1, such as 0.95, not {confidence}")


def _rate(total: float, count: float, unit: str) -> float:
    if not total >= 0:  # NaN too
        raise DataError(f"the sum of negative log-likelihoods must be at least 0, not {total}")
    if not 0 < count < math.inf:
        raise DataError(f"the number of {unit} must be positive and finite, not {count}")
    return total / count
