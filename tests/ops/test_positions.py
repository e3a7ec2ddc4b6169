import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.ops.positions import Buckets, Rope, bucket, magnitude, rope_frequencies, rotate
from tests.close import close

SCALINGS = [
    Rope(),
    Rope(scaling="linear", factor=4.0),
    Rope(scaling="llama3", factor=8.0, original_length=64),
    Rope(scaling="yarn", factor=4.0, original_length=64, low_frequency=1.0, high_frequency=8.0),
]
LONGROPE = Rope(
    scaling="longrope",
    factor=4.0,
    original_length=16,
    short_factors=(1.0, 1.1, 1.2, 1.3),
    long_factors=(1.0, 2.0, 3.0, 4.0),
)
DYNAMIC = Rope(scaling="dynamic", factor=4.0, original_length=16)


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
    plain = rope_frequencies(Rope(), 16)
    for cfg in SCALINGS[1:]:
        stretched = rope_frequencies(cfg, 16)
        assert (stretched <= plain * (1 + 1e-12)).all()
        assert (stretched >= plain / cfg.factor * (1 - 1e-12)).all()
        close(stretched[-1], plain[-1] / cfg.factor, 1e-9)  # the slowest is stretched in full
        close(magnitude(cfg), 0.1 * np.log(4) + 1 if cfg.scaling == "yarn" else 1.0, 1e-9)
        if cfg.scaling != "linear":
            close(stretched[0], plain[0], 1e-9)  # the fastest is left alone


def turned(length, cfg, start=0):
    """Return ones after rotation as complex numbers [T, K/2]: e^(i angle) (1 + i), times the attention factor."""
    positions = jnp.arange(start, length)[None]
    got = np.asarray(rotate(jnp.ones((1, length - start, 1, 8)), positions, cfg))[0, :, 0]
    return got[:, :4] + 1j * got[:, 4:]


def expected(length, frequencies, scale=1.0, start=0):
    return np.exp(1j * np.arange(start, length)[:, None] * frequencies) * (1 + 1j) * scale


@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_dynamic_raises_the_base_with_the_length_of_the_text(length):
    """The formula as transformers documents it, K = 8; a single token at the end of the text is enough to tell."""
    base = 10_000.0 * (4.0 * max(length, 16) / 16 - 3.0) ** (8 / 6)
    frequencies = base ** (-np.arange(0, 8, 2) / 8)
    close(turned(length, DYNAMIC), expected(length, frequencies))
    close(turned(length, DYNAMIC, start=length - 1), expected(length, frequencies, start=length - 1))


@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_longrope_has_other_divisors_beyond_the_original_length(length):
    divisors = np.array(LONGROPE.long_factors if length > 16 else LONGROPE.short_factors)
    frequencies = 10_000.0 ** (-np.arange(0, 8, 2) / 8) / divisors
    scale = np.sqrt(1 + np.log(4) / np.log(16))
    close(turned(length, LONGROPE), expected(length, frequencies, scale))
    close(turned(length, LONGROPE, start=length - 1), expected(length, frequencies, scale, start=length - 1))


@pytest.mark.parametrize("cfg", [DYNAMIC, LONGROPE], ids=lambda cfg: cfg.scaling)
def test_each_row_is_as_long_as_its_own_last_position(cfg):
    """Compiled once: positions, not shapes, decide."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 20, 2, 8)), jnp.float32)
    positions = jnp.minimum(jnp.arange(20)[None], jnp.array([19, 15, 4])[:, None])
    run = jax.jit(rotate, static_argnums=2)
    got = run(x, positions, cfg)
    for row, length in enumerate((20, 16, 5)):
        alone = rotate(x[row : row + 1, :length], jnp.arange(length)[None], cfg)
        close(got[row, :length], alone[0])
    assert float(jnp.abs(got[0, :16] - run(x[:1], jnp.minimum(positions[:1], 15), cfg)[0, :16]).max()) > 0.05


def test_a_ramp_that_is_not_truncated_ends_between_dimensions():
    cfg = dataclasses.replace(SCALINGS[3], truncate=False)
    ends = 16 * np.log(64 / (np.array([8.0, 1.0]) * 2 * np.pi)) / (2 * np.log(10_000))
    ramp = np.clip((np.arange(8) - ends[0]) / (ends[1] - ends[0]), 0, 1)
    plain = rope_frequencies(Rope(), 16)
    close(rope_frequencies(cfg, 16), plain * (1 - ramp) + plain / 4 * ramp, 1e-9)
    assert np.abs(rope_frequencies(cfg, 16) / rope_frequencies(SCALINGS[3], 16) - 1).max() > 0.05


def test_a_given_attention_factor_takes_the_place_of_the_methods_own():
    for cfg in (SCALINGS[3], LONGROPE):
        assert magnitude(dataclasses.replace(cfg, attention_factor=0.75)) == 0.75
    assert magnitude(dataclasses.replace(LONGROPE, factor=1.0)) == 1.0


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
    with pytest.raises(ConfigError, match="head_dim must be above 2"):
        rope_frequencies(DYNAMIC, 2)
    with pytest.raises(ConfigError, match="4 short_factors and 4 long_factors; heads of 16 need 8 each"):
        rope_frequencies(LONGROPE, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"original_length": 1}, "original_length 1"),
        ({"attention_factor": -1.0, "scaling": "yarn"}, r"attention_factor -1\.0"),
        ({"attention_factor": 0.5, "scaling": "llama3"}, "'llama3' has none; set it to 0"),
        ({"scaling": "llama3", "high_frequency": 1.0}, r"must be below high_frequency, not 1\.0 and 1\.0"),
        ({"scaling": "yarn", "low_frequency": 0.0}, "must be above 0"),
        ({"scaling": "longrope", "short_factors": (1.0, 0.0)}, "must be positive"),
    ],
)
def test_methods_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rope(**fields)


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
