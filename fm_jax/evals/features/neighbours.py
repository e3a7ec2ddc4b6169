"""Nearest neighbours by cosine similarity of features, and k-NN classification.

Legend: N known images, Q queries, K neighbours, C classes, D features.
"""

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.evals.features.embeddings import Embeddings, check_pair
from fm_jax.evals.metrics import accuracy, top_k_accuracy

_CHUNK = 1024  # queries per block of similarities, float32 [_CHUNK, N]


def nearest(known: np.ndarray, queries: np.ndarray, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest of `known` [N, D] for each of `queries` [Q, D], the nearest first.

    On ties the earlier row comes first. Features of norm zero have cosine 0 with everything.

    Returns:
        (rows of `known` int64 [Q, k], cosines float32 [Q, k]).

    Raises:
        DataError: inconsistent shapes, or fewer than k known images.
    """
    if known.ndim != 2 or queries.ndim != 2 or known.shape[1] != queries.shape[1]:
        raise DataError(f"features must be [N, D] and [Q, D], not {known.shape} and {queries.shape}")
    if not 1 <= k <= len(known):
        raise DataError(f"k must be 1 to the number of known images, {len(known)}, not {k}")
    left, right = _unit(queries), _unit(known)
    rows, cosines = np.zeros((len(left), k), np.int64), np.zeros((len(left), k), np.float32)
    for start in range(0, len(left), _CHUNK):
        here = slice(start, start + _CHUNK)
        similar = left[here] @ right.T
        rows[here] = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        cosines[here] = np.take_along_axis(similar, rows[here], axis=1)
    return rows, cosines


def votes(
    train: Embeddings, queries: np.ndarray, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """Return the vote shares [Q, C] of the k nearest neighbours, weighted by exp(cosine / temperature).

    Source: Wu et al. 2018, section 3.4.

    Raises:
        DataError: as `nearest`, labels out of range, or temperature not above 0.
    """
    if train.labels.min() < 0 or train.labels.max() >= num_classes:
        raise DataError(f"labels are {train.labels.min()} to {train.labels.max()}, outside 0 … {num_classes - 1}")
    if not temperature > 0:
        raise DataError(f"temperature must be above 0, not {temperature}")
    rows, cosines = nearest(train.features, queries, k)
    weights = np.exp((cosines - cosines[:, :1]).astype(np.float64) / temperature)
    sums = np.zeros((len(queries), num_classes))
    np.add.at(sums, (np.arange(len(queries))[:, None], train.labels[rows]), weights)
    return sums / sums.sum(axis=1, keepdims=True)


def knn(
    train: Embeddings, test: Embeddings, *, k: int = 20, temperature: float = 0.07, num_classes: int = 0
) -> dict[str, float]:
    """Return {"top1": …, "top5": …} of weighted k-NN classification; no top5 below six classes.

    Raises:
        DataError: as `votes`.
    """
    check_pair(train, test)
    classes = num_classes or int(max(train.labels.max(), test.labels.max())) + 1
    shares = votes(train, test.features, classes, k=min(k, len(train)), temperature=temperature)
    metrics = {"top1": accuracy(test.labels, shares.argmax(axis=1))}
    return metrics | ({"top5": top_k_accuracy(test.labels, shares, 5)} if classes > 5 else {})


def _unit(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
