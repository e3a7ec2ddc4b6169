"""The counted FLOPs are those of the products that a function cannot leave out."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import _products
from fm_jax.core.errors import ConfigError


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def convolve(image, kernel, stride=1, groups=1, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        image, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def test_a_product_in_nested_functions_and_scans_counts_every_time():
    def layers(x, stack):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(jax.jit(jnp.matmul)(x, w)), None), x, stack)[0]

    assert _products.flops(layers, zeros(3, 8), zeros(5, 8, 8)) == 5 * 2 * 3 * 8 * 8
    batched = _products.flops(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), zeros(2, 3, 4, 5), zeros(2, 7, 4, 5))
    assert batched == 2 * 2 * 4 * 3 * 7 * 5
    assert _products.flops(lambda x: x * 2 + x.sum(), zeros(9)) == 0


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_each_gradient_of_a_convolution_needs_as_much_as_the_convolution(size, stride, groups):
    """Every multiplication forward has one in each gradient, however XLA pads and dilates them."""
    arguments = zeros(2, size, size, 4), zeros(3, 3, 4 // groups, 8)

    def forward(image, kernel):
        return convolve(image, kernel, stride, groups)

    def step(image, kernel):
        return jax.grad(lambda *both: jnp.square(forward(*both)).sum(), argnums=(0, 1))(image, kernel)

    once = _products.flops(forward, *arguments)
    assert once > 0 and _products.flops(step, *arguments) == 3 * once


def test_padding_is_no_work():
    inner = 2 * 1 * 8 * 4  # image × output channels × input channels, a multiply-add each
    assert _products.flops(convolve, zeros(1, 1, 1, 4), zeros(3, 3, 4, 8)) == inner  # one tap of nine meets the pixel
    assert _products.flops(convolve, zeros(1, 2, 2, 4), zeros(3, 3, 4, 8)) == inner * 16
    valid = _products.flops(lambda x, k: convolve(x, k, padding="VALID"), zeros(1, 5, 5, 4), zeros(3, 3, 4, 8))
    assert valid == inner * 9 * 9


def test_what_cannot_be_counted_is_refused():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ConfigError, match="while loop"):
        _products.flops(loop, zeros(4, 4))
    assert _products.flops(lambda x: jax.lax.while_loop(lambda x: x < 1, lambda x: x + 1, x), zeros()) == 0
