import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.features import neighbours
from fm_jax.evals.features.embeddings import Embeddings
from tests.close import close

RNG = np.random.default_rng(0)
KNOWN, QUERIES = RNG.normal(size=(50, 6)), RNG.normal(size=(9, 6))


def test_the_nearest_are_those_of_the_largest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK", 4)  # the last chunk is smaller
    rows, cosines = neighbours.nearest(KNOWN, QUERIES * 100, 5)
    full = (QUERIES @ KNOWN.T) / np.linalg.norm(QUERIES, axis=1)[:, None] / np.linalg.norm(KNOWN, axis=1)[None]
    assert np.array_equal(rows, np.argsort(-full, axis=1)[:, :5])
    close(cosines, np.sort(full, axis=1)[:, ::-1][:, :5])


def test_of_equal_ones_the_first_comes_first_and_nothing_is_near_to_zero() -> None:
    rows, cosines = neighbours.nearest(np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), np.array([[3.0, 0.0]]), 3)
    assert rows.tolist() == [[1, 2, 0]] and cosines.tolist() == [[1, 1, 0]]


def test_votes_are_weighed_by_the_exponent_of_the_cosine() -> None:
    angles = np.array([0.0, 0.5, 0.6, 3.0])
    train = Embeddings(np.stack([np.cos(angles), np.sin(angles)], 1), np.array([0, 1, 1, 2]))
    found = neighbours.votes(train, np.array([[1.0, 0.0]]), 3, k=3, temperature=0.5)
    weights = np.exp(np.cos(angles[:3]) / 0.5)
    close(found, np.array([[weights[0], weights[1] + weights[2], 0]]) / weights.sum())
    assert neighbours.votes(train, np.array([[1.0, 0.0]]), 3, k=3, temperature=0.001)[0].argmax() == 0


def test_knn_finds_what_is_near() -> None:
    labels = np.arange(60) % 6
    centres = RNG.normal(size=(6, 8))
    train, test = (Embeddings(centres[labels] + RNG.normal(0, 0.1, (60, 8)), labels) for _ in range(2))
    assert neighbours.knn(train, test) == {"top1": 1.0, "top5": 1.0}
    shuffled = Embeddings(test.features, np.roll(test.labels, 1))
    assert neighbours.knn(train, shuffled, k=5)["top1"] == 0.0
    assert neighbours.knn(train.take(np.flatnonzero(labels < 5)), test.take(np.flatnonzero(labels < 5))) == {
        "top1": 1.0
    }


def test_what_does_not_fit_is_refused() -> None:
    train = Embeddings(KNOWN, np.arange(50) % 5)
    with pytest.raises(DataError, match="known images, 50, not 51"):
        neighbours.nearest(KNOWN, QUERIES, 51)
    with pytest.raises(DataError, match=r"\[N, D\] and \[Q, D\]"):
        neighbours.nearest(KNOWN, QUERIES[:, :3], 5)
    with pytest.raises(DataError, match="labels are 0 to 4, outside 0 … 3"):
        neighbours.votes(train, QUERIES, 4)
    with pytest.raises(DataError, match="temperature must be above 0"):
        neighbours.votes(train, QUERIES, 5, temperature=0)
