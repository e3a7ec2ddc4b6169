import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.layers.tap import STORED, Tap, touches, visit


class Model(nn.Module):
    """Doubles, visits, then adds one."""

    @nn.compact
    def __call__(self, x, tap=None):
        return visit(self, tap, "final", 2 * x) + 1


X = jnp.arange(3.0)


def test_no_tap_leaves_no_trace():
    model = Model()
    untapped = jax.make_jaxpr(lambda x: 2 * x + 1)(X)
    assert str(jax.make_jaxpr(lambda x: model.apply({}, x))(X)) == str(untapped)


def test_put_comes_before_add_and_both_before_read():
    tap = Tap(("final",), {"final": (jnp.array([True, False, True]), jnp.full(3, 9.0))}, {"final": jnp.full(3, 0.5)})
    out, kept = Model().apply({}, X, tap, mutable=["taps"])
    np.testing.assert_array_equal(kept["taps"][STORED + "final"], [9.5, 2.5, 9.5])
    np.testing.assert_array_equal(out, [10.5, 3.5, 10.5])


def test_an_edit_takes_the_dtype_of_what_it_edits():
    tap = Tap(add={"final": jnp.ones(3, jnp.float32)})
    assert Model().apply({}, X.astype(jnp.bfloat16), tap).dtype == jnp.bfloat16


def test_a_read_that_could_not_be_returned_is_refused():
    with pytest.raises(ValueError, match=r'cannot return final; apply with mutable=\["taps"\]'):
        Model().apply({}, X, Tap(("final",)))


def test_a_tap_is_data():
    tap = Tap(("embed", "block.mlp.out"), {"block.attn.z": (jnp.array(True), X)}, {"final": X})
    assert tap.names() == {"embed", "block.mlp.out", "block.attn.z", "final"}
    inner = tap.stacked()
    assert inner.names() == {"block.mlp.out", "block.attn.z"}
    assert touches(tap, "block.attn") and not touches(tap, "block.attn.q") and not touches(None, "embed")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, tap)  # the edits are leaves, the names are structure
    np.testing.assert_array_equal(doubled.add["final"], 2 * X)
    assert doubled.read == tap.read
