"""The baseline learns what is there, chooses on validation alone, and is the same every time."""

import json
import sys

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.baselines.tfidf import tfidf_logistic

WORDS = {0: ["socket", "server", "header"], 1: ["thread", "lock", "queue"], 2: ["parse", "tree", "node"]}
COMMON = ["the", "of", "returns", "value", "a"]


def split(seed, n, told=0.8):
    """Texts of common words and, with chance `told`, one word of the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    texts = []
    for label in labels:
        words = list(rng.choice(COMMON, 5))
        if rng.random() < told:
            words.append(rng.choice(WORDS[int(label)]))
        texts.append(" ".join(rng.permutation(words)))
    return texts, labels


def fit(test=None, **options):
    return tfidf_logistic(*split(0, 90), *split(1, 60), *(test or split(2, 200)), grid=(0.1, 10.0), **options)


RESULT = fit()


def test_it_finds_the_words_that_tell():
    # 0.8 told, a third of the rest by chance: 0.867
    assert 0.8 < RESULT["test_accuracy"] < 0.94
    assert len(RESULT["test_predictions"]) == 200
    assert RESULT["valid_accuracy"] == max(RESULT["valid_by_choice"].values())
    assert set(RESULT["valid_by_choice"]) == {"words C=0.1", "words C=10", "characters C=0.1", "characters C=10"}


def test_the_choice_never_looks_at_the_test():
    texts, labels = split(2, 200)
    other = fit((texts, (labels + 1) % 3))
    for key in ("c", "features", "valid_by_choice", "test_predictions"):
        assert other[key] == RESULT[key]
    assert other["test_accuracy"] < 0.2


def test_of_equal_choices_the_first_features_and_the_smallest_c_win():
    easy = ["left side", "right side"] * 5, [0, 1] * 5
    result = tfidf_logistic(*easy, *easy, *easy, grid=(10.0, 0.1, 1.0))
    assert set(result["valid_by_choice"].values()) == {1.0}
    assert (result["features"], result["c"]) == ("words", 0.1)


def test_the_result_is_json_and_repeats():
    assert json.loads(json.dumps(RESULT)) == fit()


def test_bad_input_is_refused_before_anything_is_fitted(monkeypatch):
    good = [*split(0, 9), *split(1, 9), *split(2, 9)]
    with pytest.raises(DataError, match="valid has 9 texts and 8 labels"):
        tfidf_logistic(*good[:3], good[3][:8], *good[4:])
    with pytest.raises(DataError, match="test has 0 texts"):
        tfidf_logistic(*good[:4], [], [])
    with pytest.raises(DataError, match="two classes"):
        tfidf_logistic(good[0], [1] * 9, *good[2:])
    with pytest.raises(ConfigError, match="grid"):
        tfidf_logistic(*good, grid=(0.0,))
    with pytest.raises(ConfigError, match="not syllables"):
        tfidf_logistic(*good, features=("syllables",))
    with pytest.raises(DataError, match="no words"):
        tfidf_logistic(["--", "!!"], [0, 1], *good[2:])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match="needs scikit-learn"):
        tfidf_logistic(*good)
