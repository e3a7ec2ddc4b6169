import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.layers.cache import init_cache, write
from fm_jax.models.language import decoder, encoder_decoder


def test_each_row_is_written_from_its_own_position():
    stored = jnp.zeros((2, 5, 1, 2))
    new = jnp.arange(1.0, 9.0).reshape(2, 2, 1, 2)
    got = write(stored, new, jnp.array([[1, 2], [3, 4]]))
    want = np.zeros((2, 5, 1, 2))
    want[0, 1:3], want[1, 3:5] = new[0], new[1]
    np.testing.assert_array_equal(got, want)


def test_one_row_of_positions_serves_the_batch():
    got = write(jnp.zeros((2, 3, 1, 1)), jnp.ones((2, 1, 1, 1)), jnp.array([[2]]))
    assert got[:, :, 0, 0].tolist() == [[0, 0, 1], [0, 0, 1]]


def test_a_write_keeps_the_stored_dtype():
    stored = jnp.zeros((1, 2, 1, 1), jnp.bfloat16)
    assert write(stored, jnp.ones((1, 1, 1, 1)), jnp.array([[0]])).dtype == jnp.bfloat16


def test_an_empty_cache_has_the_layers_first_and_the_batch_second():
    cfg = decoder.llama(3, 32, 4, 2, 48, vocab_size=40)
    model = decoder.Decoder(cfg)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    cache = init_cache(model, jax.tree.map(lambda x: jnp.zeros(x.shape), params), batch_size=5, length=7)
    leaves = jax.tree.leaves(cache)
    assert [leaf.shape for leaf in leaves] == [(3, 5, 7, 2, 8)] * 2  # keys and values: L, B, S, G, K
    assert not any(leaf.any() for leaf in leaves)


def test_a_cache_has_room_for_what_comes_of_a_context():
    model = encoder_decoder.EncoderDecoder(encoder_decoder.tiny())
    context = {"source": np.zeros((5, 9), np.int32), "source_length": np.ones(5, np.int32)}
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((5, 1), jnp.int32), *context.values())["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    cache = init_cache(model, params, 5, 7, context)["decoder"]["blocks"]
    found = {path: {name: leaf.shape for name, leaf in leaves.items()} for path, leaves in cache.items()}
    assert found == {  # the encoder keeps nothing
        "attn": {"key": (2, 5, 7, 4, 8), "value": (2, 5, 7, 4, 8)},
        "cross": {"key": (2, 5, 9, 4, 8), "value": (2, 5, 9, 4, 8), "length": (2, 5)},
    }
