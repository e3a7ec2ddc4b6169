import jax
import numpy as np
import pytest

from fm_jax.ops.depthwise import depthwise, grouped, shifted
from tests.close import close

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 9, 12, 5)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (1, 1)), ((0, 1), (2, 0))])
def test_shifted_products_are_the_grouped_convolution_and_so_are_their_gradients(size, stride, padding):
    kernel = RNG.normal(size=(size, size, 1, 5)).astype(np.float32)

    def score(function, x, kernel):
        out = function(x, kernel, stride=stride, padding=padding)
        return (out**2).sum(), out

    results = [
        jax.value_and_grad(lambda *a, f=f: score(f, *a), argnums=(0, 1), has_aux=True)(X, kernel)
        for f in (shifted, grouped)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        close(ours, theirs)


def test_each_channel_sees_itself_alone():
    kernel = RNG.normal(size=(3, 3, 1, 5)).astype(np.float32)
    other = X.copy()
    other[..., 2] += 1.0
    before, after = (depthwise(x, kernel, padding="SAME") for x in (X, other))
    changed = (np.asarray(before) != np.asarray(after)).any((0, 1, 2))
    assert changed.tolist() == [False, False, True, False, False]
