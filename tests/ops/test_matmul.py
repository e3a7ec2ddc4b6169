import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.ops import matmul
from fm_jax.ops.matmul import flat_dot_general
from tests.close import close

LHS = np.random.default_rng(0).normal(size=(2, 8, 3, 4)).astype(np.float32)
RHS = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
CONTRACT = (((3,), (0,)), ((), ()))


def test_it_is_dot_general():
    got = flat_dot_general(LHS, RHS, CONTRACT)
    close(got, LHS @ RHS)
    flattened = str(jax.make_jaxpr(lambda x: flat_dot_general(x, RHS, CONTRACT))(LHS))
    assert "dimension_numbers=(([1], [0]), ([], []))" in flattened  # one matrix product, not a batched one


@pytest.mark.parametrize(
    ("numbers", "shape"), [((((0,), (1,)), ((), ())), (5, 8)), ((((1,), (0,)), ((0,), (1,))), (4, 8, 5))]
)
def test_other_contractions_pass_through(numbers, shape):
    lhs = LHS[0, :, 0, :]  # [8, 4]
    rhs = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(flat_dot_general(lhs, rhs, numbers), jax.lax.dot_general(lhs, rhs, numbers))


def test_half_precision_accumulates_in_what_is_asked_for():
    lhs, rhs = LHS.astype(jnp.bfloat16), RHS.astype(jnp.bfloat16)
    got = flat_dot_general(lhs, rhs, CONTRACT, preferred_element_type=jnp.float32)
    assert got.dtype == jnp.float32
    close(got, lhs.astype(np.float32) @ rhs.astype(np.float32))
    assert flat_dot_general(lhs, rhs, CONTRACT).dtype == jnp.bfloat16


def test_split_time_is_not_merged_with_the_batch():
    with jax.set_mesh(make_mesh(MeshConfig(data=4, sequence=2))):
        traced = str(jax.make_jaxpr(lambda x: flat_dot_general(x, RHS, CONTRACT))(LHS))
    assert "reshape" not in traced
    close(flat_dot_general(LHS, RHS, CONTRACT), LHS @ RHS)


def test_the_highest_precision_adds_in_blocks():
    rng = np.random.default_rng(3)
    lhs, rhs = rng.random((4, 16, 1000), np.float32), rng.random((1000, 64), np.float32)  # sums that only grow
    contract = (((2,), (0,)), ((), ()))
    exact = lhs.astype(np.float64) @ rhs.astype(np.float64)
    product = jax.jit(lambda x: flat_dot_general(x, rhs, contract))
    plain = np.asarray(product(lhs))
    with jax.default_matmul_precision("highest"):
        blocked = np.asarray(product(lhs))
        traced = str(jax.make_jaxpr(lambda x: flat_dot_general(x, rhs, contract))(lhs))
        half = str(
            jax.make_jaxpr(lambda x: flat_dot_general(x, rhs.astype(jnp.bfloat16), contract))(lhs.astype("bfloat16"))
        )
    close(blocked, exact)
    assert traced.count("= dot_general") == 3  # of at most 384
    assert half.count("= dot_general") == 1
    assert rms(blocked - exact) < rms(plain - exact)


def test_the_highest_precision_may_be_given():
    rhs = np.ones((1000, 2), np.float32)
    product = lambda x, precision: flat_dot_general(x, rhs, (((1,), (0,)), ((), ())), precision=precision)  # noqa: E731
    x = np.ones((3, 1000), np.float32)
    counts = [
        str(jax.make_jaxpr(lambda x, p=p: product(x, p))(x)).count("= dot_general")
        for p in (jax.lax.Precision.HIGHEST, "float32", None, "default")
    ]
    assert counts == [3, 3, 1, 1]


PLAIN = (((1,), (0,)), ((), ()))
SHAPES = [(8, 3), (3, 8), (4, 4)]  # tall, wide and square kernels


def slopes(product, lhs, rhs):
    """Return the gradients of a product, and the derivative of that of `rhs` along `lhs`."""
    loss = lambda lhs, rhs: jnp.sin(product(lhs, rhs)).sum()  # noqa: E731
    second = jax.jvp(lambda lhs: jax.grad(loss, 1)(lhs, rhs), (lhs,), (jnp.cos(lhs),))[1]
    return jax.grad(loss, (0, 1))(lhs, rhs), second


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_those_of_the_plain_product(shape):
    rng = np.random.default_rng(4)
    lhs, rhs = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, shape[0]), shape))
    ours = lambda lhs, rhs: flat_dot_general(lhs, rhs, PLAIN)  # noqa: E731
    close(slopes(ours, lhs, rhs), slopes(jnp.matmul, lhs, rhs))
    changes = (jnp.cos(lhs), jnp.cos(rhs))
    close(jax.jvp(ours, (lhs, rhs), changes), jax.jvp(jnp.matmul, (lhs, rhs), changes))
    several = jax.vmap(jax.grad(lambda rhs, lhs: ours(lhs, rhs).sum()), (None, 0))(rhs, lhs[:, None])
    close(several, jnp.broadcast_to(lhs[:, :, None], several.shape))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_a_kernel_has_no_more_rows_than_columns_on_a_cpu(shape, tied):
    def loss(kernel, lhs):  # a tied head's kernel is a transposed table
        return jnp.sin(flat_dot_general(lhs, kernel.T if tied else kernel, PLAIN)).sum()

    kernel = jnp.ones(shape[::-1] if tied else shape)
    program = jax.jit(jax.grad(loss)).lower(kernel, jnp.ones((6, shape[0]))).compile().as_text()
    sizes = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", program)
    assert sorted(sizes) == sorted([("6", str(shape[1])), (str(min(shape)), str(max(shape)))])


def test_what_is_not_differentiated_costs_nothing(monkeypatch):
    def products(argument):
        program = jax.grad(lambda lhs, rhs: flat_dot_general(lhs, rhs, PLAIN).sum(), argument)
        return str(jax.make_jaxpr(program)(jnp.ones((6, 8)), jnp.ones((8, 3)))).count("= dot_general")

    assert [products(argument) for argument in (0, 1, (0, 1))] == [2, 2, 3]  # forward, and one for each gradient
    monkeypatch.setattr(matmul, "platform", lambda: "tpu")
    jaxpr = jax.make_jaxpr(jax.grad(lambda rhs: flat_dot_general(jnp.ones((6, 8)), rhs, PLAIN).sum()))(jnp.ones((8, 3)))
    assert "optimization_barrier" not in str(jaxpr)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))
