import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.stack import POLICIES, stack
from tests.close import close


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, layered, shared):
        x = nn.Dense(
            x.shape[-1], kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.5), ("embed", "mlp"))
        )(x)
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        return jnp.tanh(x) * layered + shared, None


X, SCALES, SHARED = jnp.ones((2, 4)), jnp.array([1.0, -2.0, 0.5]), jnp.full((2, 4), 0.1)


def made(remat="none"):
    model = stack(Block, 3, remat)()
    return model, model.init(jax.random.key(0), X, SCALES, SHARED)["params"]


def test_parameters_are_stacked_named_and_differ_by_layer():
    _, params = made()
    kernel = params["Dense_0"]["kernel"]
    assert kernel.value.shape == (3, 4, 4)
    assert kernel.names == ("layers", "embed", "mlp")
    assert np.abs(kernel.value[0] - kernel.value[1]).max() > 0.1


@pytest.mark.parametrize("remat", ["none", *POLICIES])
def test_a_stack_is_a_loop_over_its_layers(remat):
    model, params = made(remat)
    params = meta.unbox(params)
    x = X
    for layer, scale in enumerate(SCALES):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params)
        x, _ = Block().apply({"params": one}, x, scale, SHARED)
    got, _ = model.apply({"params": params}, X, SCALES, SHARED)
    close(got, x)


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x, layered, shared):
        return x + layered * nn.Dropout(0.5, deterministic=False)(shared), None


def test_each_layer_draws_its_own_noise():
    scales, ones, rngs = jnp.array([1.0, 10.0, 100.0]), jnp.ones(64), {"dropout": jax.random.key(1)}
    drawn, _ = stack(Noise, 3)().apply({}, jnp.zeros(64), scales, ones, rngs=rngs)
    digits = np.asarray(drawn, int)[None] // [[1], [10], [100]] % 10  # 2 where a layer kept a one, 0 where it did not
    assert set(digits.flat) == {0, 2}
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert 16 < (digits[one] != digits[two]).sum() < 48


def test_only_dots_with_weights_are_kept():
    def products(policy):
        model, params = made(policy)

        def loss(params):
            return model.apply({"params": meta.unbox(params)}, X, SCALES, SHARED)[0].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    # forward 1, backward 2, and "full" makes the forward product again
    assert products("none") == products("dots") == 3
    assert products("full") == 4


@pytest.mark.parametrize("remat", ["none", *POLICIES])
def test_a_shared_layer_is_applied_over_and_over(remat):
    model = stack(Block, 3, remat, shared=True)()
    boxed = model.init(jax.random.key(0), X, SCALES, SHARED)["params"]
    assert boxed["Dense_0"]["kernel"].names == ("embed", "mlp")
    params, x = meta.unbox(boxed), X
    for scale in SCALES:
        x, _ = Block().apply({"params": params}, x, scale, SHARED)
    close(model.apply({"params": params}, X, SCALES, SHARED)[0], x)
    gradient = jax.grad(lambda p: model.apply({"params": p}, X, SCALES, SHARED)[0].sum())(params)
    assert gradient["Dense_0"]["kernel"].shape == (4, 4)
