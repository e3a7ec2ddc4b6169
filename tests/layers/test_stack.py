import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import AxisType

from fm_jax.core.errors import ConfigError
from fm_jax.layers import stack as layers_stack
from fm_jax.layers.stack import POLICIES, stack, unstacked
from fm_jax.layers.tap import Tap, visit
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


def gradient(remat="none", rngs=None):
    """Return the jitted gradient of a stack of three layers, and its parameters."""
    model, params = made(remat)

    def loss(params):
        return jnp.sin(model.apply({"params": params}, X, SCALES, SHARED, rngs=rngs)[0]).sum()

    return jax.jit(jax.value_and_grad(loss)), meta.unbox(params)


def loops(remat="none"):
    run, params = gradient(remat)
    return "while(" in run.lower(params).compile().as_text()


def test_the_loop_is_unrolled_on_a_cpu_only(monkeypatch):
    rngs = {"dropout": jax.random.key(1)}
    run, params = gradient(rngs=rngs)
    unrolled = run(params)
    assert not loops()
    assert loops("full")  # without a loop XLA would undo the rematerialisation
    monkeypatch.setattr(layers_stack, "UNROLLED", 2)
    assert loops()
    close(unrolled, gradient(rngs=rngs)[0](params), 1e-6)
    monkeypatch.undo()
    monkeypatch.setattr(layers_stack, "platform", lambda: "tpu")
    assert loops()


class Named(nn.Module):
    """A model that keeps its stack where `unstacked` looks for it."""

    @nn.compact
    def __call__(self, x, layered, shared):
        return stack(Block, 3)(name="blocks")(x, layered, shared)[0]


@pytest.fixture(scope="module")
def named():
    model = Named()
    return model, model.init(jax.random.key(0), X, SCALES, SHARED)["params"]


def test_layers_of_their_own_give_what_the_stack_gives(named):
    model, boxed = named
    apart = unstacked(boxed)
    kernel = apart["blocks"]["1"]["Dense_0"]["kernel"]
    assert sorted(apart["blocks"]) == ["0", "1", "2"] and kernel.names == ("embed", "mlp")
    np.testing.assert_array_equal(kernel.value, boxed["blocks"]["Dense_0"]["kernel"].value[1])
    runs = [jax.jit(lambda p: model.apply({"params": p}, X, SCALES, SHARED)) for _ in range(2)]
    close(runs[1](apart), runs[0](boxed), 1e-6)
    programs = [str(jax.make_jaxpr(run)(params)) for run, params in zip(runs, (boxed, apart), strict=True)]
    assert ["scan[" in program for program in programs] == [True, False]


def test_what_is_not_stacked_is_returned_itself(named):
    params = {"embed": X, "blocks": meta.unbox(named[1])["blocks"], "block": {"0": X}}
    apart = unstacked(params)
    assert apart["embed"] is X and apart["block"]["0"] is X
    again = unstacked(apart)
    assert all(one is two for one, two in zip(jax.tree.leaves(apart), jax.tree.leaves(again), strict=True))


def test_layers_of_their_own_stay_split_over_devices():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    split = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    apart = unstacked({"blocks": {"kernel": jax.device_put(jnp.zeros((3, 4, 6)), split)}})
    kernel = apart["blocks"]["2"]["kernel"]
    assert kernel.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("fsdp", "tensor")), 2)


class Tapped(nn.Module):
    @nn.compact
    def __call__(self, x, tap, shared):
        x = visit(self, tap, "block.resid_pre", x)
        return x + self.param("bias", nn.initializers.ones, x.shape), None


def test_activations_are_read_from_a_stack_only():
    model = stack(Tapped, 2)()
    params, tap = {"bias": jnp.ones((2, 4))}, Tap(read=("block.resid_pre",))
    _, kept = model.apply({"params": params}, X[0], tap, None, mutable=["taps"])
    close(jax.tree.leaves(kept), [np.stack([X[0], X[0] + 1])])
    apart = unstacked({"blocks": params})["blocks"]
    with pytest.raises(ConfigError, match="the parameters are unstacked; pass stacked ones"):
        model.apply({"params": apart}, X[0], tap, None, mutable=["taps"])


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
