from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fm_jax.core import tree
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.language import decoder
from fm_jax.peft import freeze
from fm_jax.train import state
from tests.close import close

MODEL = decoder.Decoder(decoder.tiny())
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def init(key):
    return MODEL.init(key, jnp.zeros((1, 4), jnp.int32))["params"]


def create(params, frozen):
    return state.create(params, ADAM, frozen=frozen, ema=True)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def params(mesh):
    return state.init_params(init, jax.random.key(0), mesh)


def test_a_fresh_state_holds_the_parameters_twice_and_starts_at_zero():
    params = {"a": jnp.ones(3)}
    fresh = create(params, {"b": jnp.zeros(2)})
    assert fresh.step == fresh.skipped == 0
    assert fresh.params["a"] is params["a"]
    np.testing.assert_array_equal(fresh.ema["a"], params["a"])
    assert fresh.ema["a"].unsafe_buffer_pointer() != params["a"].unsafe_buffer_pointer()  # both will be donated
    assert {leaf.shape for leaf in jax.tree.leaves(fresh.opt_state)} == {(), (3,)}
    assert state.create(params, ADAM, ema=False).ema is None


def test_parameters_are_made_in_their_shards_and_do_not_depend_on_the_mesh(params):
    alone = state.init_params(init, jax.random.key(0), make_mesh(MeshConfig(), jax.devices()[:1]))
    close(tree.flatten(params), tree.flatten(alone))
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 16, 64)


def laid_out_like(one, params):
    for path, leaf in tree.flatten(one).items():
        twin = tree.flatten(params)[path]
        assert leaf.sharding.is_equivalent_to(twin.sharding, twin.ndim), path


def test_moments_and_means_are_laid_out_as_their_parameters(mesh, params):
    placed = state.place(create, params, {}, mesh)
    adam = placed.opt_state[1][0]
    for twin in (placed.params, placed.ema, adam.mu, adam.nu):
        laid_out_like(twin, params)
    for scalar in (placed.step, placed.skipped, adam.count):
        assert scalar.sharding.is_fully_replicated
    np.testing.assert_array_equal(placed.ema["embed"]["tokens"], params["embed"]["tokens"])


def test_a_stack_frozen_in_part_keeps_both_its_layouts(mesh):
    """One layer of three is trained: the same path stands in both trees with another number of layers."""
    deep = decoder.Decoder(decoder.gpt(3, 32, 4, vocab_size=96, max_length=32))
    params = state.init_params(
        lambda key: deep.init(key, jnp.zeros((1, 4), jnp.int32))["params"], jax.random.key(0), mesh
    )
    trained, frozen = freeze.below(params, 2)
    placed = state.place(create, trained, frozen, mesh)
    adam = placed.opt_state[1][0]
    assert (
        placed.params["blocks"]["mlp"]["up"]["kernel"].shape
        == adam.mu["blocks"]["mlp"]["up"]["kernel"].shape
        == (1, 32, 128)
    )
    assert placed.frozen["blocks"]["mlp"]["up"]["kernel"].shape == (2, 32, 128)
    for part in (placed.params, placed.frozen, placed.ema, adam.mu, adam.nu):
        for path, leaf in tree.flatten(part).items():
            want = tree.flatten(params)[path].sharding
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim), path


def test_the_abstract_state_is_the_placed_one_without_its_numbers(mesh, params):
    placed = state.place(create, params, {}, mesh)
    abstract = state.abstract(create, params, {}, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(placed)
    for want, got in zip(jax.tree.leaves(abstract), jax.tree.leaves(placed), strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
        assert want.sharding.is_equivalent_to(got.sharding, got.ndim)


def test_loaded_parameters_are_seen_by_the_optimiser():
    """A transformation that remembers where it began must remember what was loaded."""
    remember = optax.GradientTransformation(lambda params: {"start": params}, lambda g, s, p=None: (g, s))
    loaded = {"a": jnp.full(3, 7.0)}
    begun = jax.jit(partial(state.create, tx=remember, ema=False))(loaded)
    np.testing.assert_array_equal(begun.opt_state["start"]["a"], loaded["a"])
