import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.layers.cache import init_cache, lay, lift, map_rows, write
from fm_jax.layers.stack import unstacked
from fm_jax.models.language import decoder, encoder_decoder


def test_each_row_is_written_from_its_own_position():
    stored = jnp.zeros((2, 1, 2, 5))
    new = jnp.arange(1.0, 9.0).reshape(2, 1, 2, 2)
    positions = jnp.array([[1, 2], [3, 4]])
    want = np.zeros((2, 1, 2, 5))
    want[0, ..., 1:3], want[1, ..., 3:5] = new[0], new[1]
    np.testing.assert_array_equal(write(stored, new, positions, axis=3), want)
    flipped = write(stored.swapaxes(2, 3), new.swapaxes(2, 3), positions, axis=2)
    np.testing.assert_array_equal(flipped, want.swapaxes(2, 3))


def test_one_row_of_positions_serves_the_batch():
    got = write(jnp.zeros((2, 1, 3, 1)), jnp.ones((2, 1, 1, 1)), jnp.array([[2]]), axis=2)
    assert got[:, 0, :, 0].tolist() == [[0, 0, 1], [0, 0, 1]]


def test_a_write_keeps_the_stored_dtype():
    stored = jnp.zeros((1, 1, 2, 1), jnp.bfloat16)
    assert write(stored, jnp.ones((1, 1, 1, 1)), jnp.array([[0]]), axis=2).dtype == jnp.bfloat16


def test_what_is_laid_is_lifted():
    key, value = jnp.arange(48.0).reshape(2, 3, 2, 4), jnp.arange(48.0, 96.0).reshape(2, 3, 2, 4)
    laid = lay(key, value)
    assert [leaf.shape for leaf in laid] == [(2, 2, 4, 3), (2, 2, 3, 4)]
    for got, want in zip(lift(*laid), (key, value), strict=True):
        np.testing.assert_array_equal(got, want)


def test_rows_are_on_axis_1_and_on_axis_0_of_a_layer_of_its_own():
    cache = {"tokens": jnp.zeros((1, 5)), "decoder": {"blocks": {"attn": {"key": jnp.zeros((2, 5, 7))}}}}
    apart = unstacked(cache)
    for tree, axes in ((cache, [1, 1]), (apart, [0, 0, 1])):
        seen = []
        map_rows(lambda leaf, axis, seen=seen: seen.append((axis, leaf.shape[axis])), tree)
        assert seen == [(axis, 5) for axis in axes]


def test_an_empty_cache_has_the_layers_first_and_the_batch_second():
    cfg = decoder.llama(3, 32, 4, 2, 48, vocab_size=40)
    model = decoder.Decoder(cfg)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    cache = init_cache(model, jax.tree.map(lambda x: jnp.zeros(x.shape), params), batch_size=5, length=7)
    leaves = jax.tree.leaves(cache)
    assert [leaf.shape for leaf in leaves] == [(3, 5, 2, 8, 7), (3, 5, 2, 7, 8)]  # L, B, G, K, S and L, B, G, S, K
    assert not any(leaf.any() for leaf in leaves)


def test_a_cache_has_room_for_what_comes_of_a_context():
    model = encoder_decoder.EncoderDecoder(encoder_decoder.tiny())
    context = {"source": np.zeros((5, 9), np.int32), "source_length": np.ones(5, np.int32)}
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((5, 1), jnp.int32), *context.values())["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    cache = init_cache(model, params, 5, 7, context)["decoder"]["blocks"]
    found = {path: {name: leaf.shape for name, leaf in leaves.items()} for path, leaves in cache.items()}
    assert found == {  # the encoder keeps nothing
        "attn": {"key": (2, 5, 4, 8, 7), "value": (2, 5, 4, 7, 8)},
        "cross": {"key": (2, 5, 4, 8, 9), "value": (2, 5, 4, 9, 8), "length": (2, 5)},
    }
