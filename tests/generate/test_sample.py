import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.generate import sample as S
from tests.close import close

PROBS = np.array([[0.1, 0.4, 0.2, 0.3], [0.05, 0.05, 0.8, 0.1]], np.float32)
LOGITS = jnp.log(PROBS)


def kept(logits: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(row)) for row in np.isfinite(np.asarray(logits))]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.35, [{1}, {2}]), (0.45, [{1, 3}, {2}]), (0.75, [{1, 2, 3}, {2}]), (0.95, [{0, 1, 2, 3}, {0, 2, 3}])],
)
def test_top_p_keeps_the_token_that_crosses(p, expected):
    filtered = S.top_p(LOGITS, p)
    assert kept(filtered) == expected
    np.testing.assert_array_equal(
        np.asarray(filtered)[np.isfinite(filtered)], np.asarray(LOGITS)[np.isfinite(filtered)]
    )


def test_top_p_of_equal_logits_is_the_smallest_set():
    assert kept(S.top_p(jnp.zeros((1, 8)), 0.45)) == [{0, 1, 2, 3}]


@pytest.mark.parametrize(
    ("k", "expected"), [(1, {1, 3}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_every_token_that_ties(k, expected):
    assert kept(S.top_k(jnp.array([[0.5, 2.0, -1.0, 2.0]]), k)) == [expected]


def test_min_p_is_relative_to_the_most_probable_token():
    assert kept(S.min_p(LOGITS, 0.45)) == [{1, 2, 3}, {2}]
    assert kept(S.min_p(LOGITS, 0.1)) == [{0, 1, 2, 3}, {2, 3}]
    assert kept(S.min_p(LOGITS, 1.0)) == [{1}, {2}]


def test_filters_take_a_value_for_each_row():
    column = jnp.array([[0.35], [0.95]])
    assert kept(S.top_p(LOGITS, column)) == [{1}, {0, 2, 3}]
    assert kept(S.min_p(LOGITS, column[::-1])) == [{1}, {2}]


def test_temperature_sharpens_and_flattens_without_overflow():
    for value in (0.5, 2.0):
        expected = PROBS ** (1 / value) / (PROBS ** (1 / value)).sum(-1, keepdims=True)
        close(jax.nn.softmax(S.temperature(LOGITS, value)), expected)
    frozen = jax.nn.softmax(S.temperature(LOGITS * 1e4, 1e-30))
    np.testing.assert_array_equal(frozen, [[0, 1, 0, 0], [0, 0, 1, 0]])


def test_repetition_penalty_equals_a_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 11)).astype(np.float32)
    tokens, lengths = rng.integers(0, 11, (3, 6)), np.array([6, 2, 4])
    expected = logits.copy()
    for row in range(3):
        for token in {int(token) for token in tokens[row, : lengths[row]]}:
            expected[row, token] *= 1.7 if expected[row, token] < 0 else 1 / 1.7
    seen = S.seen_tokens(jnp.asarray(tokens), jnp.asarray(lengths), 11)
    close(S.repetition_penalty(jnp.asarray(logits), seen, 1.7), expected)
    assert (expected != logits).sum() == np.asarray(seen).sum() > 0


def test_transform_applies_the_filters_in_the_usual_order():
    seen = jnp.array([[False, True, False, False], [False, False, False, True]])
    cfg = S.Config(temperature=0.7, top_k=3, top_p=0.9, min_p=0.2, repetition_penalty=1.3)
    by_hand = S.repetition_penalty(LOGITS, seen, 1.3)
    by_hand = S.min_p(S.top_p(S.top_k(S.temperature(by_hand, 0.7), 3), 0.9), 0.2)
    close(S.transform(LOGITS, cfg, seen), by_hand)
    np.testing.assert_array_equal(S.transform(LOGITS, S.Config()), LOGITS)


def test_draws_follow_the_filtered_distribution():
    cfg = S.Config(temperature=0.8, top_k=3)
    logits = jnp.broadcast_to(LOGITS[:1], (20_000, 4))
    counts = np.bincount(S.sample(jax.random.key(0), logits, cfg), minlength=4) / 20_000
    expected = np.asarray(jax.nn.softmax(S.transform(LOGITS[:1], cfg))[0])
    assert np.abs(counts - expected).max() < 0.015  # four standard deviations
    assert counts[0] == 0


def test_temperature_zero_is_argmax_and_needs_no_key():
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    tokens = S.sample(None, logits, S.GREEDY)
    assert tokens.tolist() == [1, 0] and tokens.dtype == jnp.int32
    with pytest.raises(ConfigError, match=r"temperature 1.0 needs a key"):
        S.sample(None, logits, S.Config())


def test_a_row_draws_by_its_own_key():
    logits = jnp.zeros((6, 50))
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):  # typed and old-style keys
        batch = S.sample(key, logits, S.Config())
        keys = S.row_keys(key, jnp.arange(6))
        alone = [int(S.sample(keys[row : row + 1], logits[:1], S.Config())[0]) for row in range(6)]
        assert batch.tolist() == alone
        assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} must be .* not {value}"):
        S.Config(**{field: value})


def test_a_penalty_without_history_is_refused():
    with pytest.raises(ConfigError, match=r"repetition_penalty 1.2 needs `seen`"):
        S.transform(LOGITS, S.Config(repetition_penalty=1.2))
