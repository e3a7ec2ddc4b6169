import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.batch_norm import BatchNorm
from tests.close import close

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
    close(got, normalised(*map(np.asarray, (params["mean"], params["var"])), params))


def test_training_uses_the_batch_and_moves_the_running_moments_as_torch_does(params):
    got, new = MODEL.apply({"params": params}, X, mutable=["statistics"])
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    close(got, normalised(mean, var, params))
    close(new["statistics"]["mean"], 0.8 * params["mean"] + 0.2 * mean)
    unbiased = X.var((0, 1, 2), ddof=1)
    close(new["statistics"]["var"], 0.8 * params["var"] + 0.2 * unbiased)


def test_a_large_mean_costs_no_accuracy(params):
    got, _ = MODEL.apply({"params": params}, X + 1000.0, mutable=["statistics"])
    want, _ = MODEL.apply({"params": params}, X, mutable=["statistics"])
    close(got, want, scale=1000 / X.std())  # what is normalised is known to 1e-7 of 1000


def test_no_gradient_reaches_the_running_moments(params):
    def score(params):
        out, _ = MODEL.apply({"params": params}, X, mutable=["statistics"])
        return jnp.sum(out**3)

    slopes = jax.grad(score)(params)
    assert not slopes["mean"].any() and not slopes["var"].any()
    assert slopes["scale"].all() and slopes["bias"].all()


def test_darknet_adds_its_epsilon_to_the_deviation(params):
    got = MODEL.clone(added_to="deviation").apply({"params": params}, X)
    mean, var, scale, bias = (np.asarray(params[name]) for name in ("mean", "var", "scale", "bias"))
    close(got, (X - mean) / (np.sqrt(var) + 1e-3) * scale + bias)
    assert np.abs(got - normalised(mean, var, params)).max() > 1e-4


def test_a_constant_channel_has_a_finite_gradient(params):
    def score(x):
        out, _ = MODEL.clone(added_to="deviation").apply({"params": params}, x, mutable=["statistics"])
        return jnp.sum(out**2)

    x = jnp.asarray(X).at[..., 0].set(2.0)
    assert np.isfinite(jax.grad(score)(x)).all()
