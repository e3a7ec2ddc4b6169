import jax
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.layers.drop_path import DropPath
from tests.close import close

X = np.random.default_rng(0).normal(size=(4000, 2, 3)).astype(np.float32)


def test_without_a_key_nothing_is_dropped():
    np.testing.assert_array_equal(DropPath(0.4).apply({}, X), X)
    np.testing.assert_array_equal(DropPath(0.0).apply({}, X, rngs={"dropout": jax.random.key(0)}), X)


def test_whole_rows_are_dropped_and_the_others_make_up_for_them():
    out = np.asarray(DropPath(0.4).apply({}, X, rngs={"dropout": jax.random.key(0)}))
    dropped = (out == 0).all(axis=(1, 2))
    assert abs(dropped.mean() - 0.4) < 0.03  # 4 standard deviations
    close(out[~dropped], X[~dropped] / 0.6)


def test_an_infinite_update_that_is_dropped_leaves_no_nan():
    out = DropPath(0.5).apply({}, np.full((64, 1), np.inf, np.float32), rngs={"dropout": jax.random.key(0)})
    assert set(np.asarray(out).ravel()) == {0.0, np.inf}


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_leaves_nothing_is_refused(rate):
    with pytest.raises(ConfigError, match=f"must be in .0, 1., not {rate}"):
        DropPath(rate).apply({}, X)


def test_a_part_of_the_rate_drops_that_part_as_often_and_none_nothing():
    for part in (0.0, 0.5):
        out = np.asarray(DropPath(0.8).apply({}, X, part, rngs={"dropout": jax.random.key(0)}))
        dropped = (out == 0).all(axis=(1, 2))
        assert abs(dropped.mean() - 0.8 * part) < 0.03
        close(out[~dropped], X[~dropped] / (1 - 0.8 * part))
