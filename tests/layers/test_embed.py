import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from fm_jax.layers.dense import normal
from fm_jax.layers.embed import Embed
from tests.close import close

TOKENS = jnp.array([[3, 1, 3], [0, 6, 2]])
POSITIONS = jnp.array([[0, 1, 2], [4, 0, 1]])


def made(max_length, dtype=jnp.float32):
    model = Embed(7, 4, max_length, normal(1.0), dtype)
    return model, meta.unbox(model.init(jax.random.key(0), TOKENS, POSITIONS))["params"]


def test_a_token_at_a_position_is_the_sum_of_two_rows():
    model, params = made(max_length=5)
    want = np.asarray(params["tokens"])[TOKENS] + np.asarray(params["positions"])[POSITIONS]
    np.testing.assert_array_equal(model.apply({"params": params}, TOKENS, POSITIONS), want)


def test_without_a_position_table_positions_do_nothing():
    model, params = made(max_length=0)
    assert set(params) == {"tokens"}
    np.testing.assert_array_equal(
        model.apply({"params": params}, TOKENS, POSITIONS), np.asarray(params["tokens"])[TOKENS]
    )


def test_the_tied_head_scores_against_the_table_in_float32():
    model, params = made(max_length=0, dtype=jnp.bfloat16)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.bfloat16)
    got = model.apply({"params": params}, hidden, method="attend")
    assert got.dtype == jnp.float32
    table = np.asarray(params["tokens"].astype(jnp.bfloat16), np.float32)
    close(got, np.asarray(hidden, np.float32) @ table.T)


def test_a_row_outside_the_tables_is_not_a_number():
    """JAX would clamp an index in silence; a wrong id or position must be seen."""
    model, params = made(max_length=5)
    assert np.isnan(model.apply({"params": params}, jnp.array([[7]]), jnp.array([[0]]))).all()
    assert np.isnan(model.apply({"params": params}, jnp.array([[0]]), jnp.array([[5]]))).all()
