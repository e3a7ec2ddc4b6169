import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import digits
from fm_jax.evals.features.embeddings import Embeddings
from fm_jax.evals.features.fewshot import few_shot, pick, ridge
from tests.close import close

RNG = np.random.default_rng(0)


def pixels(split: str) -> Embeddings:
    found = digits.Digits(split)
    rows = [found[i] for i in range(len(found))]
    return Embeddings(
        np.stack([image[..., 0].ravel() for image, _ in rows]).astype(np.float32), np.array([y for _, y in rows])
    )


@pytest.mark.parametrize("count", [5, 40])  # fewer examples than features, and more
def test_ridge_solves_the_normal_equations(count: int) -> None:
    x, labels, penalties = RNG.normal(size=(count, 8)), np.arange(count) % 3, (0.1, 2.0)
    found = ridge(x, labels, np.arange(3), penalties)
    a = np.concatenate([x, np.ones((count, 1))], 1)
    y = 2 * np.eye(3)[labels] - 1
    for weights, penalty in zip(found, penalties, strict=True):
        close(weights, np.linalg.solve(a.T @ a + penalty * np.eye(9), a.T @ y), 1e-9)


def test_pixels_of_digits_give_the_accuracies_that_are_known() -> None:
    train, valid, test = (pixels(split) for split in ("train", "validation", "test"))
    found = few_shot(train, test, shots=(1, 5, 20), valid=valid)
    assert 0.5 < found["1"]["mean"] < 0.68 and 0.75 < found["5"]["mean"] < 0.86 and 0.87 < found["20"]["mean"] < 0.95
    for one in found.values():
        assert one["low"] < one["mean"] < one["high"]
        close(one["mean"], np.mean(one["draws"]), 1e-9)
    assert few_shot(train, test, shots=(1,), valid=valid)["1"] == found["1"]  # no draw depends on another budget
    plain = few_shot(train, test, shots=(5,), draws=1)["5"]
    assert plain["penalty"] == 1.0 and plain["low"] == plain["high"] == plain["draws"][0]


def test_the_penalty_is_chosen_on_validation_and_the_largest_of_equals() -> None:
    labels = np.arange(40) % 2
    easy = Embeddings(np.stack([labels * 2.0 - 1, labels * 2.0 - 1], 1), labels)
    assert few_shot(easy, easy, shots=(2,), valid=easy, penalties=(0.5, 8.0, 2.0))["2"]["penalty"] == 8.0


def test_so_many_of_every_class_are_picked() -> None:
    labels = np.repeat([0, 1, 4], [5, 9, 3])
    rows = pick(labels, 3, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [3, 3, 0, 0, 3] and len(set(rows)) == 9
    assert not np.array_equal(rows, pick(labels, 3, np.random.default_rng(1)))
    with pytest.raises(DataError, match="class 4 has 3 examples, fewer than 4"):
        pick(labels, 4, np.random.default_rng(0))


def test_what_cannot_be_measured_is_refused() -> None:
    found = Embeddings(RNG.normal(size=(6, 2)), np.arange(6) % 2)
    with pytest.raises(ConfigError, match=r"must be above 0"):
        few_shot(found, found, draws=0)
    with pytest.raises(DataError, match="features of 2 and of 1"):
        few_shot(found, Embeddings(found.features[:, :1], found.labels), shots=(1,))
