import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.layers.dense import dense, normal
from tests.close import about, close


@pytest.mark.parametrize(
    ("std", "gain", "want"), [(0.02, 1.0, 0.02), (0.0, 1.0, 200**-0.5), (0.0, 0.5, 0.5 * 200**-0.5)]
)
def test_kernels_are_drawn_with_the_spread_that_is_asked_for(std, gain, want):
    kernel = normal(std, gain)(jax.random.key(0), (200, 300), jnp.float32)
    about(float(kernel.std()), want, 0.02)
    assert abs(float(kernel.mean())) < 0.02 * want


def test_a_layer_carries_its_names_and_stays_float32():
    layer = dense(6, ("embed", "mlp"), bias=True, init=normal(0.0), dtype=jnp.bfloat16)
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)["params"]
    assert params["kernel"].names == ("embed", "mlp")
    assert params["bias"].names == ("mlp",)
    assert params["kernel"].value.dtype == jnp.float32
    out = layer.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    close(out[0, 0].astype(np.float32), params["kernel"].value.sum(0), 0.02)
