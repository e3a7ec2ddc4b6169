"""Metrics against scikit-learn, scipy, loops and hand-worked cases."""

import math

import numpy as np
import pytest
from sklearn import metrics as theirs

from fm_jax.core.errors import DataError
from fm_jax.evals import metrics
from tests.close import close


def draws(seed):
    """Labels and predictions in which classes are absent from one, from the other, or from both."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    classes = rng.permutation(9)
    return rng.choice(classes[: rng.integers(1, 9)], n), rng.choice(classes[-rng.integers(1, 9) :], n)


def test_accuracy_f1_and_confusion_equal_scikit_learn_with_absent_classes():
    for seed in range(200):
        labels, guesses = draws(seed)
        close(metrics.accuracy(labels, guesses), theirs.accuracy_score(labels, guesses), 1e-9)
        wanted = theirs.f1_score(labels, guesses, average="macro", zero_division=0)
        close(metrics.macro_f1(labels, guesses), wanted, 1e-9)
        wanted = theirs.confusion_matrix(labels, guesses, labels=range(9))
        np.testing.assert_array_equal(metrics.confusion(labels, guesses, 9), wanted)


def test_metrics_take_text_labels():
    assert metrics.accuracy(["a", "b"], ["a", "c"]) == 0.5
    close(metrics.macro_f1(["a", "b"], ["a", "c"]), 1 / 3, 1e-9)


def loop_calibration(probabilities, labels, bins):
    """The definition, bin by bin."""
    total = 0.0
    for m in range(bins):
        inside = [
            (float(row.max()), int(row.argmax()) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if m / bins < row.max() <= (m + 1) / bins
        ]
        if inside:
            gap = np.mean([hit for _, hit in inside]) - np.mean([confidence for confidence, _ in inside])
            total += len(inside) / len(labels) * abs(gap)
    return total


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_equals_its_definition(bins):
    rng = np.random.default_rng(bins)
    probabilities = rng.dirichlet(np.full(4, 0.5), size=300)
    labels = rng.integers(0, 4, 300)
    got = metrics.expected_calibration_error(probabilities, labels, bins)
    close(got, loop_calibration(probabilities, labels, bins), 1e-9)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    # 0.6 right and 0.7 wrong: in one bin of (0.5, 1] they cancel in part, in two of (…, 0.6] and (0.6, …] they do not.
    probabilities, labels = [[0.6, 0.4], [0.7, 0.3]], [0, 1]
    close(metrics.expected_calibration_error(probabilities, labels, 2), 0.15, 1e-9)
    close(metrics.expected_calibration_error(probabilities, labels, 5), (0.4 + 0.7) / 2, 1e-9)


def test_calibrated_predictions_have_little_error_and_overconfident_ones_much():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((20_000, 1)) > chances.cumsum(1)).sum(1).clip(0, 4)
    sharp = np.exp(4 * logits) / np.exp(4 * logits).sum(1, keepdims=True)
    assert metrics.expected_calibration_error(chances, labels) < 0.015
    assert metrics.expected_calibration_error(sharp, labels) > 0.15
    assert metrics.expected_calibration_error(np.eye(5)[labels], labels) == 0


def test_uniform_guessing_has_perplexity_v_and_eight_bits_a_byte():
    close(metrics.perplexity(100 * math.log(50), 100), 50, 1e-9)
    close(metrics.bits_per_byte(100 * math.log(256), 100), 8, 1e-9)
    assert metrics.perplexity(0, 3) == 1
    assert metrics.perplexity(1e6, 1) == math.inf


def test_the_interval_over_seeds_is_students():
    from scipy import stats

    values = [0.71, 0.74, 0.69, 0.75, 0.73]
    for confidence in (0.8, 0.95, 0.99):
        got = metrics.mean_interval(values, confidence)
        low, high = stats.t.interval(confidence, 4, np.mean(values), stats.sem(values))
        close(tuple(got), (np.mean(values), low, high), 1e-9)
    assert metrics.mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_the_interval_of_one_accuracy_is_wilsons():
    from scipy import stats

    for correct, total in [(0, 1), (1, 1), (0, 20), (20, 20), (3, 7), (180, 292), (999, 1000)]:
        for confidence in (0.9, 0.95):
            low, high = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
            got = metrics.accuracy_interval(correct, total, confidence)
            close(tuple(got), (correct / total, low, high), 1e-9, scale=1.0)
            assert 0 <= got.low <= got.estimate <= got.high <= 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.accuracy([], []), "N above 0"),
        (lambda: metrics.accuracy([1, 2], [1]), r"\(2,\) and \(1,\)"),
        (lambda: metrics.macro_f1([[1]], [[1]]), r"\(1, 1\)"),
        (lambda: metrics.confusion([0, 3], [0, 1], 3), "labels are 0 to 3, outside 0 … 2"),
        (lambda: metrics.confusion([0.5], [0], 3), "labels must be integers, not float64"),
        (lambda: metrics.expected_calibration_error([[2.0, -1.0]], [0]), "softmax"),
        (lambda: metrics.expected_calibration_error([[math.nan, 1.0]], [0]), "softmax"),
        (lambda: metrics.expected_calibration_error([[0.5, 0.5]], [2]), "labels are 2 to 2"),
        (lambda: metrics.expected_calibration_error([0.5, 0.5], [0, 1]), r"\[N, C\]"),
        (lambda: metrics.expected_calibration_error([[1.0]], [0], bins=0), "bins"),
        (lambda: metrics.perplexity(1, 0), "number of tokens"),
        (lambda: metrics.perplexity(math.nan, 1), "nan"),
        (lambda: metrics.bits_per_byte(-1, 10), "not -1"),
        (lambda: metrics.mean_interval([0.5]), "at least two"),
        (lambda: metrics.mean_interval([0.5, math.inf]), "inf"),
        (lambda: metrics.mean_interval([0.5, 0.6], 95), "not 95"),
        (lambda: metrics.accuracy_interval(5, 4), "5 correct of 4"),
        (lambda: metrics.accuracy_interval(0, 0), "0 correct of 0"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, said):
    with pytest.raises(DataError, match=said):
        call()


def test_the_top_k_hold_the_label_and_of_equal_scores_the_first_count():
    scores = np.random.default_rng(0).normal(size=(200, 7))
    labels = np.random.default_rng(1).integers(0, 7, 200)
    for k in (1, 2, 7):
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        assert metrics.top_k_accuracy(labels, scores, k) == np.mean(
            [y in row for y, row in zip(labels, best, strict=True)]
        )
    close(metrics.top_k_accuracy([0, 1, 2], np.zeros((3, 3)), 2), 2 / 3, 1e-9)  # no credit for a constant
    with pytest.raises(DataError, match="scores are NaN"):
        metrics.top_k_accuracy([0], [[math.nan, 1.0]], 1)
    with pytest.raises(DataError, match="top-3 accuracy needs scores"):
        metrics.top_k_accuracy([0], [[0.0, 1.0]], 3)
    with pytest.raises(DataError, match="labels are 2 to 2, outside 0 … 1"):
        metrics.top_k_accuracy([2], [[0.0, 1.0]], 1)
