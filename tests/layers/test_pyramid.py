import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.pyramid import Pyramid, double
from tests.close import close

RNG = np.random.default_rng(0)
STAGES = [RNG.normal(size=(2, *size, c)).astype(np.float32) for size, c in (((9, 12), 4), ((5, 6), 6), ((3, 3), 8))]


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (6, 7)])
def test_doubling_is_the_nearest_position(size):
    x = RNG.normal(size=(1, 3, 4, 2)).astype(np.float32)
    rows, columns = (np.arange(side) * half // side for side, half in zip(size, x.shape[1:3], strict=True))
    np.testing.assert_array_equal(double(x, *size), x[:, rows][:, :, columns])


def test_coarse_maps_are_added_to_fine_ones():
    model = Pyramid(5)
    params = jax.jit(lambda: meta.unbox(model.init(jax.random.key(0), STAGES)["params"]))()
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), params)
    maps = jax.jit(lambda params: model.apply({"params": params}, STAGES))(params)
    assert [x.shape for x in maps] == [(2, 9, 12, 5), (2, 5, 6, 5), (2, 3, 3, 5), (2, 2, 2, 5)]
    np.testing.assert_array_equal(maps[3], maps[2][:, ::2, ::2])

    def lateral(number):
        weights = params[f"lateral{number}"]
        return STAGES[number - 1] @ np.asarray(weights["kernel"])[0, 0] + np.asarray(weights["bias"])

    second = lateral(2) + np.asarray(double(lateral(3), 5, 6))
    total = lateral(1) + np.asarray(double(second, 9, 12))
    kernel, padded = np.asarray(params["out1"]["kernel"]), np.pad(total, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = sum(padded[:, i : i + 9, j : j + 12] @ kernel[i, j] for i, j in np.ndindex(3, 3))
    close(maps[0], want + np.asarray(params["out1"]["bias"]))
