import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.ops.convolution import convolve, direct, product
from tests.close import close

MAPS = [(1, 1), (2, 3), (4, 4), (5, 7)]
KERNELS = [(1, 1), (2, 2), (3, 3), (1, 3), (4, 2), (5, 5)]
PADDINGS = ["SAME", "VALID", ((1, 1), (1, 1)), ((0, 1), (2, 0))]


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def oracle(x, kernel, g, stride, padding):
    """Convolve in float64, place by place: the output and the gradients for the cotangent g."""
    x, kernel, g = (array.astype(np.float64) for array in (x, kernel, g))
    (high, wide), extents = kernel.shape[:2], x.shape[1:3]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(extents, (high, wide), (stride,) * 2, padding)
    pads = tuple(padding)
    framed = np.pad(x, ((0, 0), *pads, (0, 0)))
    out, dx, dkernel = np.zeros(g.shape), np.zeros(framed.shape), np.zeros(kernel.shape)
    for i, j in itertools.product(*map(range, g.shape[1:3])):
        window = np.s_[:, i * stride : i * stride + high, j * stride : j * stride + wide]
        out[:, i, j] = np.einsum("bhwc,hwcf->bf", framed[window], kernel)
        dx[window] += np.einsum("bf,hwcf->bhwc", g[:, i, j], kernel)
        dkernel += np.einsum("bhwc,bf->hwcf", framed[window], g[:, i, j])
    (top, _), (left, _) = pads
    return out, dx[:, top : top + extents[0], left : left + extents[1]], dkernel


def all_three(form, stride, padding):
    """Return the function (x, kernel, g) -> output and gradients of a form."""

    def compute(x, kernel, g):
        out, back = jax.vjp(functools.partial(form, stride=stride, padding=padding), x, kernel)
        return out, *back(g)

    return compute


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_products_of_patches_are_the_convolution_and_its_gradients(stride, padding):
    cases = []
    for extents, sides in itertools.product(MAPS, KERNELS):
        x, kernel = drawn((2, *extents, 3), (*sides, 3, 4))
        shape = jax.eval_shape(functools.partial(direct, stride=stride, padding=padding), x, kernel).shape
        if math.prod(shape):
            cases.append((x, kernel, *drawn(shape)))
    results = jax.jit(lambda: [all_three(product, stride, padding)(*case) for case in cases])()
    for operands, got in zip(cases, results, strict=True):
        close(got, oracle(*operands, stride, padding))


def test_a_window_larger_than_the_padded_image_gives_an_empty_map():
    x, kernel = drawn((2, 1, 2, 3), (3, 3, 3, 4))
    assert convolve(x, kernel, padding="VALID").shape == direct(x, kernel, padding="VALID").shape == (2, 0, 0, 4)


def lowered(shape, kernel, stride, pad, *platforms):
    """Lower a convolution with its gradients; return the program, not optimised."""
    x, kernel = jnp.zeros(shape), jnp.zeros(kernel)
    options = {"stride": stride, "padding": [(pad, pad)] * 2}
    g = jnp.zeros(jax.eval_shape(functools.partial(direct, **options), x, kernel).shape)
    traced = jax.jit(all_three(convolve, *options.values())).trace(x, kernel, g)
    return traced.lower(lowering_platforms=platforms or None)


@pytest.mark.parametrize(
    ("extent", "size", "stride", "pad", "products"),
    [
        (2, 3, 1, 1, True),
        (3, 3, 1, 1, False),
        (4, 3, 2, 1, True),  # the input's gradient only: 3×3 over the output's 2×2
        (5, 3, 2, 1, False),
        (6, 2, 1, 1, True),  # the kernel's gradient only: the output's 7×7 over 6×6
        (6, 7, 1, 3, True),
        (9, 1, 1, 0, True),
        (9, 1, 2, 0, True),
    ],
)
def test_xla_swaps_operands_exactly_where_products_replace_them(extent, size, stride, pad, products):
    """The threshold is XLA's rule: a release that changes it, or compiles reversed windows well, is seen here."""
    shape, kernel = (2, extent, extent, 3), (size, size, 3, 4)
    program = lowered(shape, kernel, stride, pad).compile().as_text()
    assert (" convolution(" not in program) == products
    assert "rhs_reversal" not in program
    if products and size > 1:
        x, weights = drawn(shape, kernel)
        out = direct(x, weights, stride=stride, padding=[(pad, pad)] * 2)
        plain = jax.jit(all_three(direct, stride, [(pad, pad)] * 2)).lower(x, weights, out).compile()
        assert "rhs_reversal" in plain.as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_a_program_for_another_platform_has_its_convolutions(platform):
    """Lowered here, on a CPU, as when a run for another machine is compiled ahead."""
    program = lowered((2, 2, 2, 3), (3, 3, 3, 4), 1, 1, platform).as_text()
    assert program.count("stablehlo.convolution") == 3
    assert "dot_general" not in program


def test_the_product_holds_under_every_transformation():
    x, kernel, tangent = drawn((2, 2, 2, 3), (3, 3, 3, 3), (2, 2, 2, 3))
    options = {"stride": 1, "padding": "SAME"}

    def results(form):
        form = functools.partial(form, **options)

        def energy(x, kernel):
            return jnp.sum(jax.lax.scan(lambda y, _: (jnp.tanh(form(y, kernel)), None), x, length=2)[0] ** 2)

        slope = jax.grad(energy, (0, 1))
        return {
            "scan": slope(x, kernel),
            "hessian": jax.jvp(lambda x: slope(x, kernel), (x,), (tangent,)),
            "vmap": jax.vmap(form, (None, 0))(x, jnp.stack([kernel, 2 * kernel])),
            "remat": jax.grad(jax.checkpoint(energy))(x, kernel),
        }

    eager, jitted = results(convolve), jax.jit(lambda: results(convolve))()
    wanted = jax.jit(lambda: results(direct))()
    close(eager, wanted)
    close(jitted, wanted)


@pytest.mark.parametrize("size", [1, 3])
def test_bfloat16_is_rounded_once(size):
    x, kernel, g = drawn((8, 2, 2, 64), (size, size, 64, 64), (8, 2, 2, 64))
    narrow = [array.astype(jnp.bfloat16) for array in (x, kernel, g)]
    got = all_three(convolve, 1, "SAME")(*narrow)
    assert all(array.dtype == jnp.bfloat16 for array in got)
    exact = oracle(*(np.asarray(array, np.float32) for array in narrow), 1, "SAME")
    close([np.asarray(array, np.float32) for array in got], list(exact), 0.04)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("split", [(None, "tensor"), ("tensor", None)])
def test_a_mesh_changes_nothing_and_gathers_nothing(size, split):
    """The batch over data and fsdp, input or output channels over tensor."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x, kernel, g = drawn((8, 2, 2, 4), (size, size, 4, 6), (8, 2, 2, 6))
    rows = ("data", "fsdp")
    specs = P(rows, None, None, split[0]), P(None, None, *split), P(rows, None, None, split[1])
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, kernel, g), specs, strict=True)]
    program = jax.jit(all_three(convolve, 1, "SAME")).lower(*placed).compile()
    close(program(*placed), oracle(x, kernel, g, 1, "SAME"))
    assert "all-gather" not in program.as_text()
