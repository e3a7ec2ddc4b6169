import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.batch_norm import BatchNorm

B, H, W, C = 4, 3, 5, 6
X = np.random.default_rng(0).normal(3.0, 2.0, (B, H, W, C)).astype(np.float32)
MODEL = BatchNorm(epsilon=1e-3, momentum=0.8)


@pytest.fixture(scope="module")
def params():
    fresh = meta.unbox(MODEL.init(jax.random.key(0), X))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32), fresh)


def normalised(mean, var, params):
    return (X - mean) / np.sqrt(var + 1e-3) * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_evaluation_uses_the_running_moments_and_changes_nothing(params):
    got = MODEL.apply({"params": params}, X)
    np.testing.assert_allclose(got, normalised(*map(np.asarray, (params["mean"], params["var"])), params), atol=1e-5)


def test_training_uses_the_batch_and_moves_the_running_moments_as_torch_does(params):
    got, new = MODEL.apply({"params": params}, X, mutable=["statistics"])
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    np.testing.assert_allclose(got, normalised(mean, var, params), atol=1e-5)
    np.testing.assert_allclose(new["statistics"]["mean"], 0.8 * params["mean"] + 0.2 * mean, rtol=1e-5)
    unbiased = X.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(new["statistics"]["var"], 0.8 * params["var"] + 0.2 * unbiased, rtol=1e-5)


def test_a_large_mean_costs_no_accuracy(params):
    got, _ = MODEL.apply({"params": params}, X + 1000.0, mutable=["statistics"])
    want, _ = MODEL.apply({"params": params}, X, mutable=["statistics"])
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_no_gradient_reaches_the_running_moments(params):
    def score(params):
        out, _ = MODEL.apply({"params": params}, X, mutable=["statistics"])
        return jnp.sum(out**3)

    slopes = jax.grad(score)(params)
    assert not slopes["mean"].any() and not slopes["var"].any()
    assert slopes["scale"].all() and slopes["bias"].all()
