import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.dense import normal
from fm_jax.layers.relative import RelativeBias
from fm_jax.ops.positions import Buckets

CFG = Buckets(8, 16)


def made(bidirectional):
    model = RelativeBias(CFG, 3, bidirectional, normal(1.0))
    params = meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), int), jnp.zeros((1, 1), int)))["params"]
    assert params["table"].shape == (8, 3)
    return model, params


@pytest.mark.parametrize("bidirectional", [True, False])
def test_each_pair_reads_the_row_of_its_distance(bidirectional):
    model, params = made(bidirectional)
    bias = model.apply({"params": params}, jnp.arange(5)[None], jnp.arange(7)[None])
    assert bias.shape == (1, 3, 5, 7)
    near = {0: 0, 1: 1} if bidirectional else {0: 0, 1: 1, 2: 2, 3: 3}  # a bucket each
    for back, row in near.items():
        np.testing.assert_array_equal(bias[0, :, 4, 4 - back], params["table"][row])
    ahead = params["table"][5 if bidirectional else 0]  # of the upper half, or as if it were at distance 0
    np.testing.assert_array_equal(bias[0, :, 3, 4], ahead)


def test_rows_may_stand_at_positions_of_their_own():
    """One query a row, as in cached decoding: the bias is the matching row of the whole."""
    model, params = made(False)
    whole = model.apply({"params": params}, jnp.arange(9)[None], jnp.arange(9)[None])
    at = jnp.array([[8], [3], [5]])
    one = model.apply({"params": params}, at, jnp.arange(9)[None])
    np.testing.assert_array_equal(one[:, :, 0], whole[0].transpose(1, 0, 2)[at[:, 0]])
