import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.dense import normal
from fm_jax.layers.mlp import ACTIVATIONS, MLP, MLPConfig
from tests.close import close, small

POINTS = np.linspace(-4, 4, 81, dtype=np.float32)
ERF = np.array([math.erf(x / 2**0.5) for x in POINTS])
TEXTBOOK = {
    "gelu": POINTS * 0.5 * (1 + ERF),
    "gelu_tanh": 0.5 * POINTS * (1 + np.tanh((2 / np.pi) ** 0.5 * (POINTS + 0.044715 * POINTS**3))),
    "quick_gelu": POINTS / (1 + np.exp(-1.702 * POINTS)),
    "silu": POINTS / (1 + np.exp(-POINTS)),
    "relu": np.maximum(POINTS, 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_their_names_say(name):
    close(ACTIVATIONS[name](POINTS), TEXTBOOK[name])


@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_gelu_is_accurate_in_its_tail_too(dtype, within):
    x = np.linspace(-8, 8, 1001).astype(dtype)
    wide = x.astype(np.float64)
    chance = np.array([0.5 * math.erfc(-point / 2**0.5) for point in wide])
    gelu = ACTIVATIONS["gelu"]
    close(gelu(jnp.asarray(x)).astype(np.float32), wide * chance, within, scale=1.0)
    slopes = jax.vmap(jax.grad(gelu))(jnp.asarray(x)).astype(np.float32)
    close(slopes, chance + wide * np.exp(-(wide**2) / 2) / (2 * math.pi) ** 0.5, within, scale=1.0)


@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False), (True, True)])
def test_the_layer_is_two_or_three_products(gated, bias):
    model = MLP(MLPConfig(12, "silu", gated, bias), normal(0.3), normal(0.3))
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    params = meta.unbox(model.init(jax.random.key(0), x))["params"]
    if bias:
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    def dense(name, x):
        return x @ params[name]["kernel"] + (np.reshape(params[name]["bias"], (1, 1, -1)) if bias else 0)

    def silu(x):
        return x / (1 + np.exp(-x))

    up = dense("up", x)
    want = dense("down", silu(dense("gate", x)) * up if gated else silu(up))
    assert set(params) == ({"up", "gate", "down"} if gated else {"up", "down"})
    close(model.apply({"params": params}, jnp.asarray(x)), want)


def test_dropout_falls_on_the_activations_and_comes_with_a_key_only():
    x = jnp.ones((1, 1, 8))
    model = MLP(MLPConfig(1000, "relu", bias=False, dropout=0.25), normal(0.3), normal(0.3))
    params = meta.unbox(model.init(jax.random.key(0), x))["params"]
    params["down"]["kernel"] = jnp.ones((1000, 8)) / 1000  # the mean of the activations
    params["up"]["kernel"] = jnp.ones((8, 1000)) / 8
    close(model.apply({"params": params}, x), 1.0, 1e-4)  # a sum of 1000 numbers
    dropped = model.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})[0, 0]
    small(np.ptp(dropped), 1e-5)
    assert 1e-4 < abs(float(dropped[0]) - 1) < 0.1  # kept ones are 4/3, on average 1


@pytest.mark.parametrize(
    ("activation", "gated", "count"), [("gelu", False, 2), ("gelu_tanh", False, 2), ("silu", True, 3)]
)
def test_the_gradient_keeps_what_goes_into_and_comes_out_of_the_activation(activation, gated, count):
    model, x = MLP(MLPConfig(12, activation, gated), normal(0.3), normal(0.3)), jnp.ones((2, 3, 8))
    params = meta.unbox(model.init(jax.random.key(0), x))
    _, gradient = jax.eval_shape(lambda params: jax.vjp(lambda params: model.apply(params, x), params), params)
    wide = [leaf for leaf in jax.tree.leaves(gradient) if leaf.shape[-1:] == (12,) and leaf.size == 2 * 3 * 12]
    assert len(wide) == count
