import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.ops.pooling import compared, max_pool, reduced
from tests.close import close

RNG = np.random.default_rng(0)
X = RNG.integers(0, 4, (2, 7, 10, 3)).astype(np.float32)  # many equal values


def both(x, **given):
    """Return the pooled maps and the gradients of a weighted sum of them, by both forms."""

    def one(form):
        def score(x):
            out = form(x, **given)
            return (out * jnp.arange(out.size, dtype=x.dtype).reshape(out.shape)).sum(), out

        return jax.jit(jax.grad(score, has_aux=True))(x)

    return one(compared), one(reduced)


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (2, 2, 0), (3, 3, 0)])
def test_comparisons_give_the_pooled_map_and_the_gradient_to_the_first_of_equals(size, stride, padding):
    (slope, out), (want_slope, want) = both(X, size=size, stride=stride, padding=padding)
    np.testing.assert_array_equal(out, want)
    close(slope, want_slope)  # an input in several windows gets a sum


def test_nan_is_not_hidden():
    x = X.copy()
    x[0, 3, 4, 1] = np.nan
    out, want = (form(x, size=3, stride=2, padding=1) for form in (compared, reduced))
    np.testing.assert_array_equal(out, want)
    assert np.isnan(out).sum() == 2  # windows that see row 3 and column 4


@pytest.mark.parametrize(("platform", "windows"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_other_platforms_have_their_reduction(platform, windows):
    traced = jax.jit(lambda x: max_pool(x, 3, stride=2, padding=1)).trace(X)
    assert ("reduce_window" in traced.lower(lowering_platforms=(platform,)).as_text()) == windows
