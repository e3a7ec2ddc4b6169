"""The linear probe: logistic regression on frozen features."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.features.embeddings import Embeddings, check_pair, standardise
from fm_jax.evals.metrics import accuracy, top_k_accuracy

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def linear_probe(
    train: Embeddings,
    valid: Embeddings,
    test: Embeddings,
    *,
    moments: Embeddings | None = None,
    grid: Sequence[float] = GRID,
    max_iter: int = 1000,
) -> dict[str, Any]:
    """Fit logistic regression on train, choose C by validation accuracy, then evaluate once on test.

    Features are standardised by the moments of `train`, or of `moments` (all images, if few have labels). C is the
    inverse strength of the L2 penalty; on a tie the smaller C wins. The result is deterministic.

    Returns:
        c, valid_accuracy, test_accuracy, test_top5 (None below six classes), valid_by_c: {"0.01": accuracy, …},
        test_predictions: list [N], and converged: whether the chosen fit did. All values are JSON data.

    Raises:
        ConfigError: scikit-learn is missing, or a C is not positive.
        DataError: features of different dimensions, fewer than two training classes, or a class that train lacks.
    """
    if not len(grid) or min(grid) <= 0:
        raise ConfigError(f"the grid of C must contain positive numbers, not {list(grid)}")
    for other in (valid, test, moments or train):
        check_pair(train, other)
    classes = np.unique(train.labels)
    if len(classes) < 2:
        raise DataError(f"all training labels are {classes[0]}; a classifier needs two classes")
    if len(unknown := np.setdiff1d(np.concatenate([valid.labels, test.labels]), classes)):
        raise DataError(f"class {unknown[0]} is in validation or test, but not in train")
    try:
        import sklearn.exceptions
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError('the linear probe needs scikit-learn; install "fm_jax[quickstart]"') from error

    known = (moments or train).features
    _, inputs, held_out, unseen = standardise(known, train.features, valid.features, test.features)
    scores: dict[float, float] = {}
    models = {}
    for c in sorted(grid):
        with warnings.catch_warnings():  # the result says whether it converged
            warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
            models[c] = LogisticRegression(C=c, max_iter=max_iter).fit(inputs, train.labels)
        scores[c] = accuracy(valid.labels, models[c].predict(held_out))
    c = max(scores, key=lambda key: scores[key])  # on a tie the first
    model = models[c]
    predictions = model.predict(unseen)
    places = np.searchsorted(classes, test.labels)
    return {
        "c": float(c),
        "valid_accuracy": scores[c],
        "test_accuracy": accuracy(test.labels, predictions),
        "test_top5": top_k_accuracy(places, model.decision_function(unseen), 5) if len(classes) > 5 else None,
        "valid_by_c": {f"{key:g}": score for key, score in scores.items()},
        "converged": bool(np.max(model.n_iter_) < max_iter),
        "test_predictions": predictions.tolist(),
    }
