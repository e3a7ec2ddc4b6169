import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import digits
from fm_jax.evals.features.embeddings import Embeddings
from fm_jax.evals.features.probe import linear_probe


def pixels(split: str) -> Embeddings:
    found = digits.Digits(split)
    rows = [found[i] for i in range(len(found))]
    return Embeddings(
        np.stack([image[..., 0].ravel() for image, _ in rows]).astype(np.float32), np.array([y for _, y in rows])
    )


def blobs(seed: int, count: int = 60) -> Embeddings:
    """Three classes on one axis of two; the other is loud noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = np.stack([labels + rng.normal(0, 0.1, count), rng.normal(0, 1000, count)], 1).astype(np.float32)
    return Embeddings(features, labels)


def test_a_probe_of_pixels_reads_digits_as_well_as_it_is_known_to() -> None:
    found = linear_probe(pixels("train"), pixels("validation"), pixels("test"), grid=(0.01, 0.1))
    assert 0.94 < found["test_accuracy"] < 0.99 and found["test_top5"] > found["test_accuracy"] and found["converged"]
    assert len(found["test_predictions"]) == 450 and set(found["valid_by_c"]) == {"0.01", "0.1"}


def test_features_are_standardised_so_loud_noise_does_not_drown_the_signal() -> None:
    found = linear_probe(blobs(0), blobs(1), blobs(2))
    assert found["test_accuracy"] > 0.95 and found["test_top5"] is None


def test_c_is_chosen_on_validation_and_the_smaller_of_equals() -> None:
    found = linear_probe(blobs(0), blobs(1), blobs(2), grid=(10.0, 1e-6, 1.0))
    best = max(found["valid_by_c"].values())
    assert found["c"] == min(float(c) for c, score in found["valid_by_c"].items() if score == best)
    assert found["valid_accuracy"] == best


def test_what_cannot_be_probed_is_refused() -> None:
    train, other = blobs(0), blobs(1)
    with pytest.raises(ConfigError, match="the grid of C must contain positive numbers"):
        linear_probe(train, other, other, grid=(0.0,))
    with pytest.raises(DataError, match="features of 2 and of 1 dimensions"):
        linear_probe(train, other, Embeddings(other.features[:, :1], other.labels))
    with pytest.raises(DataError, match="class 5 is in validation or test, but not in train"):
        linear_probe(train, Embeddings(other.features, other.labels + 5), other)
    with pytest.raises(DataError, match="all training labels are 0"):
        linear_probe(train.take(np.flatnonzero(train.labels == 0)), other, other)
