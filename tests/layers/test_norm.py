import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.norm import Norm, NormConfig
from tests.close import close

X = np.random.default_rng(0).normal(2.0, 3.0, size=(2, 3, 8)).astype(np.float32)
SCALE, BIAS = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)


def normed(cfg, x, **params):
    return Norm(cfg).apply({"params": params}, jnp.asarray(x))


def test_layer_norm_is_the_textbook_one():
    want = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-5) * SCALE + BIAS
    close(normed(NormConfig(), X, scale=SCALE, bias=BIAS), want)
    close(normed(NormConfig(bias=False), X, scale=SCALE), want - BIAS)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_the_textbook_one(offset):
    want = X / np.sqrt(np.square(X).mean(-1, keepdims=True) + 1e-6) * (SCALE + offset)
    close(normed(NormConfig("rms", 1e-6, offset=offset), X, scale=SCALE), want)


@pytest.mark.parametrize("cfg", [NormConfig(), NormConfig("rms"), NormConfig("rms", offset=1.0)])
def test_a_fresh_norm_only_normalises(cfg):
    params = meta.unbox(Norm(cfg).init(jax.random.key(0), X))["params"]
    assert set(params) == ({"scale", "bias"} if cfg.kind == "layer" else {"scale"})
    close(np.square(normed(cfg, X, **params)).mean(-1), 1.0, 5e-5)  # but for epsilon


def test_a_large_mean_does_not_eat_the_variance():
    rng = np.random.default_rng(2)
    x = rng.normal(1000.0, 1.0, size=(4, 256)).astype(np.float32)
    exact = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(-1, keepdims=True, dtype=np.float64)
    got = normed(NormConfig(), x, scale=np.ones(256, np.float32), bias=np.zeros(256, np.float32))
    close(got, exact, scale=1000.0)  # what is normalised is known to 1e-7 of 1000


def test_half_precision_is_normalised_in_float32():
    if "SSE" in os.environ["XLA_FLAGS"]:
        pytest.skip("XLA cannot link float16's conversions without the processor's own (F16C, from AVX2 on)")
    x = jnp.asarray(X * 3e3, jnp.float16)  # squares beyond float16's 65504
    got = Norm(NormConfig(), jnp.float16).apply({"params": {"scale": SCALE, "bias": BIAS}}, x)
    assert got.dtype == jnp.float16
    close(got, normed(NormConfig(), x.astype(jnp.float32), scale=SCALE, bias=BIAS), 5e-3)
