"""Few-shot linear evaluation: ridge regression to ±1 in closed form (as in Kolesnikov et al. 2020).

Legend: N examples, D features, C classes, R penalties.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.features.embeddings import Embeddings, check_pair, standardise
from fm_jax.evals.metrics import accuracy, mean_interval

PENALTIES = tuple(2.0**power for power in range(-10, 7, 2))


def few_shot(
    train: Embeddings,
    test: Embeddings,
    *,
    shots: Sequence[int] = (1, 5, 20),
    draws: int = 5,
    penalties: Sequence[float] = PENALTIES,
    valid: Embeddings | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Fit on n labels per class, for several random draws, and measure the test accuracy of each.

    All features are standardised by the moments of all of `train`, which needs no labels, and divided by √D. One
    penalty serves all draws of a budget: the one with the best mean validation accuracy, on a tie the largest. Without
    `valid` it is 1.

    Returns:
        {"1": {"mean", "low", "high" (95 % over draws; the mean for one draw), "draws": [accuracy …], "penalty"}, …}

    Raises:
        ConfigError: no draws, shots or penalties, or one that is not positive.
        DataError: features of different dimensions, or a class with too few examples.
    """
    if draws < 1 or not len(shots) or min(shots) < 1 or not len(penalties) or min(penalties) <= 0:
        raise ConfigError(f"shots {list(shots)}, draws {draws} and penalties {list(penalties)} must be above 0")
    check_pair(train, test)
    scale = math.sqrt(train.features.shape[1])
    held_out = valid.features if valid is not None else test.features[:0]
    inputs, unseen, held_out = (part / scale for part in standardise(train.features, test.features, held_out))
    grid = sorted(penalties) if valid is not None else [1.0]
    classes = np.unique(train.labels)
    results = {}
    for n in shots:
        by_draw, chosen_by = [], []
        for draw in range(draws):
            rows = pick(train.labels, n, np.random.default_rng((seed, n, draw)))
            weights = ridge(inputs[rows], train.labels[rows], classes, grid)
            by_draw.append(_accuracies(weights, classes, unseen, test.labels))
            if valid is not None:
                chosen_by.append(_accuracies(weights, classes, held_out, valid.labels))
        best = 0
        if valid is not None:
            mean = np.mean(chosen_by, axis=0)
            best = int(np.flatnonzero(mean == mean.max())[-1])
        scores = [float(row[best]) for row in by_draw]
        interval = mean_interval(scores) if draws > 1 else (scores[0],) * 3
        names = ("mean", "low", "high")
        results[str(n)] = dict(zip(names, interval, strict=True)) | {"draws": scores, "penalty": float(grid[best])}
    return results


def pick(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the rows [n · C] of n random examples of every class in labels [N].

    Raises:
        DataError: a class has fewer than n examples.
    """
    rows = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) < n:
            raise DataError(f"class {label} has {len(mine)} examples, fewer than {n}; lower the labels per class")
        rows.append(rng.choice(mine, n, replace=False))
    return np.concatenate(rows)


def ridge(inputs: np.ndarray, labels: np.ndarray, classes: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Fit ridge regression of inputs [N, D] to y = 1 for the class and -1 otherwise: weights [R, D + 1, C].

    They minimise Σ|x·w + b - y|² + penalty·(|w|² + b²); one singular value decomposition serves all penalties.
    """
    x = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    y = np.where(labels[:, None] == classes[None], 1.0, -1.0)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    turned = left.T @ y
    return np.stack([right.T @ ((values / (values**2 + penalty))[:, None] * turned) for penalty in penalties])


def _accuracies(weights: np.ndarray, classes: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the accuracy [R] of each penalty's weights."""
    x = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    return np.array([accuracy(labels, classes[(x @ w).argmax(axis=1)]) for w in weights])
