import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.optim import optimizer
from fm_jax.peft import freeze
from tests.close import close

LAYERS, WIDTH = 4, 8
SHAPES = {
    "embed/tokens": (12, WIDTH),
    "blocks/attn/q/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/attn/q/bias": (LAYERS, WIDTH),
    "norm_final/scale": (WIDTH,),
    "head/kernel": (WIDTH, 3),
}


def make_params(shapes=SHAPES):
    rng = np.random.default_rng(0)
    return tree.unflatten({path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()})


def loss(params):
    """A stacked model in small: every leaf has a gradient."""

    def layer(x, block):
        q = block["attn"]["q"]
        return jnp.tanh(x @ q["kernel"] + q["bias"][None]), None

    x, _ = jax.lax.scan(layer, params["embed"]["tokens"], params["blocks"])
    return jnp.mean(jnp.square(x * params["norm_final"]["scale"][None] @ params["head"]["kernel"] - 1.0))


SPLITS = {
    "probe": lambda params: freeze.by_pattern(params, ("head/.*",)),
    "below": lambda params: freeze.below(params, 3),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_ten_steps_move_every_trained_leaf_and_no_bit_of_the_frozen_ones(split):
    params = make_params()
    trained, frozen = split(params)
    tx = optimizer.make(optimizer.Config("adamw", weight_decay=0.1), 0.01, trained)

    @jax.jit
    def step(trained, state):
        grads = jax.grad(lambda part: loss(freeze.combine(part, frozen)))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    state, new = tx.init(trained), trained
    for _ in range(10):
        new, state = step(new, state)
    before, after = tree.flatten(trained), tree.flatten(new)
    assert all(np.all(np.any(after[path] != before[path], axis=-1)) for path in before)
    whole, still = tree.flatten(freeze.combine(new, frozen)), tree.flatten(frozen)
    for path, leaf in still.items():
        np.testing.assert_array_equal(whole[path][: len(leaf)], tree.flatten(params)[path][: len(leaf)], err_msg=path)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == sorted(2 * [leaf.size for leaf in before.values()])  # two moments a trained leaf, nothing else


def test_a_linear_probe_trains_the_head_alone():
    trained, frozen = freeze.by_pattern(make_params(), ("head/.*",))
    assert set(tree.flatten(trained)) == {"head/kernel"}
    assert set(tree.flatten(frozen)) == set(SHAPES) - {"head/kernel"}


@pytest.mark.parametrize("layer", [0, 1, 3, LAYERS])
def test_below_cuts_the_stack_freezes_the_embeddings_and_combines_to_the_same_bits(layer):
    params = make_params()
    trained, frozen = freeze.below(params, layer)
    assert "embed/tokens" in tree.flatten(frozen)
    assert {"norm_final/scale", "head/kernel"} <= set(tree.flatten(trained))
    for part, height in ((trained, LAYERS - layer), (frozen, layer)):
        heights = [leaf.shape[0] for path, leaf in tree.flatten(part).items() if path.startswith("blocks/")]
        assert heights == ([height] * 2 if height else [])
    assert tree.count(trained) + tree.count(frozen) == tree.count(params)
    again = freeze.combine(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_gradient_of_the_trained_layers_is_that_of_the_whole_model():
    params = make_params()
    trained, frozen = freeze.below(params, 1)
    part = jax.jit(jax.grad(lambda part: loss(freeze.combine(part, frozen))))(trained)
    whole, _ = freeze.below(jax.jit(jax.grad(loss))(params), 1)
    close(part, whole)


def test_a_named_stack_of_several_is_cut_and_the_other_trains_whole():
    shapes = {"encoder/blocks/kernel": (4, 2, 2), "decoder/blocks/kernel": (3, 2, 2), "encoder/embed/tokens": (5, 2)}
    trained, frozen = freeze.below(make_params(shapes), 2, "encoder/blocks")
    assert {path: leaf.shape[0] for path, leaf in tree.flatten(trained).items()} == {
        "decoder/blocks/kernel": 3,
        "encoder/blocks/kernel": 2,
    }
    assert {path: leaf.shape[0] for path, leaf in tree.flatten(frozen).items()} == {
        "encoder/blocks/kernel": 2,
        "encoder/embed/tokens": 5,
    }


def test_below_keeps_the_layout_of_sharded_leaves():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = make_params()
    layout = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    params["blocks"]["attn"]["q"]["kernel"] = jax.device_put(params["blocks"]["attn"]["q"]["kernel"], layout)
    trained, frozen = freeze.below(params, 1)
    again = jax.jit(freeze.combine)(trained, frozen)
    for part in (trained, frozen, again):
        kernel = part["blocks"]["attn"]["q"]["kernel"]
        assert kernel.sharding.is_equivalent_to(layout, 3)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("split", "named"),
    [
        (lambda params: freeze.by_pattern(params, ("haed/.*",)), "haed"),
        (lambda params: freeze.below(params, -1), "not -1"),
        (lambda params: freeze.below(params, LAYERS + 1), f"not {LAYERS + 1}"),
        (lambda params: freeze.below(params, 1, "layers"), "'layers'"),
        (lambda params: freeze.below(params, 1, "head"), "'head'"),
    ],
)
def test_a_split_that_names_nothing_is_refused(split, named):
    with pytest.raises(ConfigError, match=named):
        split(make_params())


def test_combine_refuses_a_whole_leaf_in_both_trees():
    params = make_params()
    with pytest.raises(ValueError, match="head/kernel"):
        freeze.combine({"head": params["head"]}, {"head": params["head"]})
