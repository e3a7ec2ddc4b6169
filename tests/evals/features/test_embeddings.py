from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.features import embeddings
from fm_jax.evals.features.embeddings import Embeddings

FOUND = Embeddings(
    np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 1, 2]), np.array(["a", "b", "ü", "d"])
)


def test_features_are_those_of_all_rows_but_padding() -> None:
    batches = [
        {
            "image": np.full((2, 3), 10.0 * i, np.float32) + np.arange(2)[:, None],
            "label": np.array([i, i + 1]),
            "weights": np.array([1.0, w]),
        }
        for i, w in ((0, 1.0), (1, 0.0))
    ]
    found = embeddings.embed(lambda p, batch: p * batch["image"], jnp.float32(2), batches, ids=["x", "y", "z"])
    assert found.features[:, 0].tolist() == [0, 2, 20] and found.labels.tolist() == [0, 1, 1]
    assert found.ids is not None and found.ids.tolist() == ["x", "y", "z"]
    with pytest.raises(DataError, match="3 features have ids of shape"):
        embeddings.embed(lambda p, batch: batch["image"], 0, batches, ids=["x"])


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    for found in (FOUND, Embeddings(FOUND.features, FOUND.labels)):
        embeddings.save(tmp_path / "new" / "a.npz", found)
        read = embeddings.load(tmp_path / "new" / "a.npz")
        assert np.array_equal(read.features, found.features) and np.array_equal(read.labels, found.labels)
        assert (read.ids is None) == (found.ids is None) and (read.ids is None or (read.ids == FOUND.ids).all())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_a_file_that_is_not_ours_is_refused_by_name(tmp_path: Path) -> None:
    embeddings.save(tmp_path / "whole.npz", FOUND)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.save(tmp_path / "plain.npy", np.ones(3))
    for name in ("half.npz", "text.npz", "other.npz", "plain.npy", "missing.npz"):
        with pytest.raises(DataError, match=rf"cannot read embeddings .*{name}"):
            embeddings.load(tmp_path / name)


def test_rows_are_taken_with_labels_and_names() -> None:
    few = FOUND.take([2, 0])
    assert few.labels.tolist() == [1, 0] and few.ids is not None and few.ids.tolist() == ["ü", "a"] and len(few) == 2


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.ones((2, 3)), np.array([0]), r"must be \[N, D\] and \[N\]"),
        (np.ones((0, 3)), np.zeros(0, int), r"N and D above 0"),
        (np.ones((2, 3)), np.array([0.0, 1.0]), "labels must be integers"),
        (np.array([[1.0], [np.nan]]), np.array([0, 1]), r"row 1 \(and of 0 more rows\) are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(features: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Embeddings(features, labels)


def test_standardising_uses_the_moments_of_training_alone() -> None:
    train = np.array([[0.0, 7.0], [4.0, 7.0]])
    one, two = embeddings.standardise(train, np.array([[6.0, 9.0]]))
    assert one.tolist() == [[-1, 0], [1, 0]] and two.tolist() == [[2, 0]]  # a constant feature says nothing
