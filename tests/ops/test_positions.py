from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.ops.positions import Buckets, Rope, bucket, rope_frequencies, rotate
from tests.close import close

SCALINGS = [
    Rope(),
    Rope(scaling="linear", factor=4.0),
    Rope(scaling="llama3", factor=8.0, original_length=64),
    Rope(scaling="yarn", factor=4.0, original_length=64, low_frequency=1.0, high_frequency=8.0),
]


def test_rotation_is_a_product_of_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 90]])
    got = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), Rope()))
    turns = np.exp(1j * positions[:, :, None, None] * 10_000.0 ** (-np.arange(4) / 4))
    want = (x[..., :4] + 1j * x[..., 4:]) * turns
    close(got, np.concatenate([want.real, want.imag], axis=-1))


@pytest.mark.parametrize("cfg", SCALINGS, ids=lambda cfg: cfg.scaling)
def test_products_depend_on_distance_alone(cfg):
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(at_query, at_key):
        turned = rotate(query, jnp.array([[at_query]]), cfg), rotate(key, jnp.array([[at_key]]), cfg)
        return float((turned[0] * turned[1]).sum())

    size = float(jnp.linalg.norm(query) * jnp.linalg.norm(key))
    close(product(5, 3), product(105, 103), scale=size)
    assert abs(product(5, 3) - product(5, 4)) > 2e-3 * size


def test_stretched_frequencies_lie_between_the_old_and_the_interpolated_ones():
    plain, _ = rope_frequencies(Rope(), 16)
    for cfg in SCALINGS[1:]:
        stretched, scale = rope_frequencies(cfg, 16)
        assert (stretched <= plain * (1 + 1e-12)).all()
        assert (stretched >= plain / cfg.factor * (1 - 1e-12)).all()
        close(stretched[-1], plain[-1] / cfg.factor, 1e-9)  # the slowest is stretched in full
        close(scale, 0.1 * np.log(4) + 1 if cfg.scaling == "yarn" else 1.0, 1e-9)
        if cfg.scaling != "linear":
            close(stretched[0], plain[0], 1e-9)  # the fastest is left alone


def test_far_positions_keep_their_precision_in_half():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    got = rotate(x, jnp.array([[100_000]]), Rope())
    assert got.dtype == jnp.bfloat16
    want = [np.cos(100_000) - np.sin(100_000), np.cos(100_000) + np.sin(100_000)]
    close(got[0, 0, 0].astype(np.float32), np.array(want), 0.05)


def test_what_cannot_rotate_is_refused():
    with pytest.raises(ConfigError, match="head_dim 7 must be even"):
        rope_frequencies(Rope(), 7)
    with pytest.raises(ConfigError, match=r"base 0\.5 and factor 1.0"):
        Rope(base=0.5)
    with pytest.raises(ConfigError, match=r"factor 0\.5"):
        Rope(scaling="linear", factor=0.5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 16), (64, 256)])
def test_every_offset_falls_into_torchs_bucket(count, distance, bidirectional):
    """Eager and compiled; tests/goldens/t5.py wrote what torch computed."""
    with np.load(Path(__file__).parents[1] / "goldens" / "t5.npz") as golden:
        want = golden[f"buckets/{count}-{distance}/{'both' if bidirectional else 'causal'}"]
    offsets = jnp.arange(-2048, 2049)
    for run in (bucket, jax.jit(bucket, static_argnums=1, static_argnames="bidirectional")):
        np.testing.assert_array_equal(run(offsets, Buckets(count, distance), bidirectional=bidirectional), want)
    # the upper half begins with a bucket for keys at distance 0 after the query, which there are none
    assert set(want.tolist()) == set(range(count)) - ({count // 2} if bidirectional else set())


def test_buckets_that_leave_a_half_empty_are_refused():
    with pytest.raises(ConfigError, match="max_distance > count / 2, not count 2 and max_distance 128"):
        Buckets(2)
    with pytest.raises(ConfigError, match="not count 32 and max_distance 16"):
        Buckets(32, 16)
