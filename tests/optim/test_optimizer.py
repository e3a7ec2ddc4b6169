import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.language import decoder
from fm_jax.models.language import encoder_decoder as t5
from fm_jax.optim import optimizer
from fm_jax.optim.optimizer import Config
from tests.close import close, small

LAYERS = 2
SHAPES = {
    "embed/tokens": (12, 8),
    "embed/positions": (6, 8),
    "blocks/norm/bias": (LAYERS, 8),
    "blocks/attn/q/kernel": (LAYERS, 8, 8),
    "blocks/mlp/up/kernel": (LAYERS, 8, 20),
    "head/kernel": (8, 12),
}


def random_tree(seed, shapes=SHAPES):
    """Layers differ tenfold in size, so that a norm over the stack is far from each layer's."""
    rng = np.random.default_rng(seed)
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    for path, leaf in flat.items():
        if path.startswith("blocks/"):
            leaf *= np.reshape(10.0 ** -np.arange(leaf.shape[0]), (-1,) + (1,) * (leaf.ndim - 1))
    return tree.unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def unstack(params):
    """Return the same model with one node a layer: no leaf is stacked."""
    flat = {}
    for path, leaf in tree.flatten(params).items():
        if path.startswith("blocks/"):
            flat |= {f"layer{i}/{path.removeprefix('blocks/')}": part for i, part in enumerate(leaf)}
        else:
            flat[path] = leaf
    return tree.unflatten(flat)


def compile_lightly(function):
    """The optimisers are many small loops: compiling them well costs ten times what running them does."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def train(tx, params, grads):
    """Return the parameters after one step on each gradient."""

    def run(params, grads):
        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    return compile_lightly(run)(params, grads)


def update_once(tx, params, grads):
    return compile_lightly(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(params, grads)


def ten_grads(change=lambda x: x, shapes=SHAPES):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(change(random_tree(100 + i, shapes)) for i in range(10)))


@pytest.mark.parametrize("name", sorted(optimizer.USUAL.keys() - {"adam"}))  # adamw is adam and more
def test_stacked_layers_train_exactly_as_separate_ones(name):
    cfg, params = Config(name), random_tree(0)
    stacked = train(optimizer.make(cfg, 0.01, params), params, ten_grads())
    apart = train(optimizer.make(cfg, 0.01, unstack(params)), unstack(params), ten_grads(unstack))
    close(unstack(stacked), apart)


@pytest.mark.parametrize(
    ("cfg", "peer"),
    [
        (Config("adamw", 0.1, b2=0.95), lambda lr, m: optax.adamw(lr, 0.9, 0.95, weight_decay=0.1, mask=m)),
        (Config("adam"), lambda lr, m: optax.adam(lr)),
        (Config("sgd", momentum=0.8), lambda lr, m: optax.sgd(lr, 0.8)),
        (Config("sgd", momentum=0.8, nesterov=True), lambda lr, m: optax.sgd(lr, 0.8, nesterov=True)),
        (
            Config("sgd", 0.05),
            lambda lr, m: optax.chain(optax.add_decayed_weights(0.05, mask=m), optax.sgd(lr, 0.9)),
        ),
        (Config("lion", 0.3), lambda lr, m: optax.lion(lr, 0.9, 0.99, weight_decay=0.3, mask=m)),
        (Config("lamb", 0.02), lambda lr, m: optax.lamb(lr, 0.9, 0.999, 1e-6, weight_decay=0.02, mask=m)),
        (Config("adafactor"), lambda lr, m: optax.adafactor(lr)),
        (
            Config("lars", 0.02, momentum=0.8),
            lambda lr, m: optax.lars(lr, 0.02, m, trust_coefficient=0.001, trust_ratio_mask=m, momentum=0.8),
        ),
        (
            Config("rmsprop", 0.02, momentum=0.8),
            lambda lr, m: optax.chain(
                optax.add_decayed_weights(0.02, mask=m),
                optax.rmsprop(lr, 0.9, 1e-3, initial_scale=1.0, eps_in_sqrt=True, momentum=0.8),
            ),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Config) else "",
)
def test_ten_steps_equal_optax_itself_where_no_layer_is_stacked(cfg, peer):
    params, grads = unstack(random_tree(0)), ten_grads(unstack)
    rate = optax.linear_schedule(0.02, 0.001, 10)
    peer_tx = optax.chain(optax.clip_by_global_norm(1.0), peer(rate, optimizer.decay_mask(params)))
    found = train(optimizer.make(cfg, rate, params), params, grads)
    close(found, train(peer_tx, params, grads))


def test_adafactor_factors_each_matrix_of_a_stack_and_never_across_layers():
    wide = {"blocks/up/kernel": (2, 128, 130), "blocks/up/bias": (2, 130)}
    tall = {"blocks/bias": (130, 128)}  # as many layers as an axis needs to be factored
    cfg = Config("adafactor", clip_norm=None)  # a clip over the whole tree would tell the layers apart
    for shapes in (wide, tall):
        params, grads = random_tree(1, shapes), ten_grads(shapes=shapes)
        tx = optimizer.make(cfg, 0.01, params)
        stacked = jax.tree.map(lambda leaf: leaf[1], train(tx, params, grads))
        second = [jax.tree.map(lambda leaf: leaf[1], params), jax.tree.map(lambda leaf: leaf[:, 1], grads)]
        close(stacked, train(optax.adafactor(0.01), *second))
        sizes = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))}
        if shapes is wide:
            assert {(2, 128), (2, 130)} <= sizes and (2, 128, 130) not in sizes


def test_lars_gives_each_layer_its_own_rate_and_leaves_vectors_theirs():
    params, grads = random_tree(0), random_tree(7)
    tx = optimizer.make(Config("lars", weight_decay=0.1, clip_norm=None), 0.5, params)
    found = tree.flatten(update_once(tx, params, grads))
    flat, slopes = tree.flatten(params), tree.flatten(grads)
    for layer in range(LAYERS):
        weights, slope = (np.asarray(part["blocks/mlp/up/kernel"][layer], np.float64) for part in (flat, slopes))
        slope = slope + 0.1 * weights
        want = -0.5 * 0.001 * np.linalg.norm(weights) / np.linalg.norm(slope) * slope
        close(found["blocks/mlp/up/kernel"][layer], want)
    for path in ("blocks/norm/bias", "embed/positions"):  # no decay, no ratio
        close(found[path], -0.5 * slopes[path])


def test_muon_orthogonalises_hidden_matrices_layer_by_layer_at_adamw_size():
    params, grads = random_tree(0), random_tree(7)
    tx = optimizer.make(Config("muon", weight_decay=0.0), 1.0, params)
    updates = update_once(tx, params, grads)
    for path in ("attn/q", "mlp/up"):
        first, second = path.split("/")
        for layer in range(LAYERS):
            grad = np.asarray(grads["blocks"][first][second]["kernel"][layer], np.float64)
            update = np.asarray(updates["blocks"][first][second]["kernel"][layer], np.float64)
            left, _, right = np.linalg.svd(grad, full_matrices=False)
            core = -left.T @ update @ right.T / (0.2 * math.sqrt(max(grad.shape)))
            # Newton-Schulz stops near 1: singular values about 0.7 to 1.2, vectors kept
            assert np.all((np.diag(core) > 0.5) & (np.diag(core) < 1.5)), (path, layer, np.diag(core))
            small(np.abs(core - np.diag(np.diag(core))).max(), 1e-3)
            # a matrix of full rank min(m, n): entries of root mean square about 0.2
            assert 0.12 < np.sqrt(np.mean(update**2)) < 0.26


def test_muon_scales_by_the_matrix_and_not_by_the_height_of_the_stack():
    tall = {"blocks/kernel": (24, 4, 6)}
    params, grads = random_tree(0, tall), random_tree(7, tall)
    cfg = Config("muon", clip_norm=None)
    whole = update_once(optimizer.make(cfg, 1.0, params), params, grads)["blocks"]["kernel"]
    one, its_grad = ({"kernel": part["blocks"]["kernel"][2]} for part in (params, grads))
    alone = update_once(optimizer.make(cfg, 1.0, one), one, its_grad)["kernel"]
    close(whole[2], alone)


def test_muon_leaves_vectors_embeddings_and_head_to_adam():
    params, grads = random_tree(0), random_tree(7)
    tx = optimizer.make(Config("muon", weight_decay=0.0), 1.0, params)
    found = tree.flatten(update_once(tx, params, grads))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0, 0.9, 0.95))
    expected = tree.flatten(update_once(adam, params, grads))
    kernels = {path for path in SHAPES if path.startswith("blocks/") and path.endswith("kernel")}
    for path in SHAPES.keys() - kernels:
        close(found[path], expected[path])
    state = jax.eval_shape(tx.init, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == SHAPES["blocks/mlp/up/kernel"]]
    assert len(moments) == 1  # momentum only, no second moment


def test_muon_leaves_t5s_tables_of_biases_to_adam_and_orthogonalises_all_else_in_its_stacks():
    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 4), (1, 4), (1,))]
    boxed = jax.eval_shape(t5.EncoderDecoder(t5.tiny()).init, jax.random.key(0), *inputs)["params"]
    params = random_tree(0, {path: leaf.shape for path, leaf in tree.flatten(meta.unbox(boxed)).items()})
    tx = optimizer.make(Config("muon", weight_decay=0.0, clip_norm=None), 1.0, params)
    updates = tree.flatten(update_once(tx, params, params))
    # Adam's first step is as long as the rate everywhere
    adam = {path for path, update in updates.items() if np.abs(np.abs(update) - 1).max() < 1e-2}
    assert adam == {path for path in updates if not path.endswith("/kernel")}
    assert {"encoder/bias/table", "decoder/bias/table"} < adam


def decoder_params(cfg):
    model = decoder.Decoder(cfg)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))
    return meta.unbox(boxed)["params"]


def test_decay_reaches_the_matrices_of_the_real_decoder_and_nothing_else():
    mask = tree.flatten(optimizer.decay_mask(decoder_params(decoder.tiny())))
    kernels = {f"blocks/attn/{name}/kernel" for name in "qkvo"} | {
        f"blocks/mlp/{name}/kernel" for name in ("up", "down")
    }
    assert {path for path, decays in mask.items() if decays} == kernels | {"embed/tokens"}
    left = {path for path, decays in mask.items() if not decays}
    assert {"embed/positions", "blocks/attn/q/bias", "blocks/mlp/up/bias", "blocks/norm_mlp/scale"} <= left

    untied = tree.flatten(optimizer.decay_mask(decoder_params(decoder.llama(2, 32, 4, 2, 48, vocab_size=96))))
    kernels |= {"blocks/mlp/gate/kernel"}
    assert {path for path, decays in untied.items() if decays} == kernels | {"embed/tokens", "head/kernel"}


def test_a_stacked_vector_is_not_decayed_whatever_its_name():
    params = random_tree(0, {"blocks/attn/gain": (2, 8), "blocks/attn/table": (2, 4, 8), "gate": (8,)})
    mask = tree.flatten(optimizer.decay_mask(params))
    assert mask == {"blocks/attn/gain": False, "blocks/attn/table": True, "gate": False}


def test_with_no_gradient_decay_alone_moves_decayed_leaves_by_rate_times_decay():
    params = random_tree(0)
    tx = optimizer.make(Config("adamw", weight_decay=0.1), 0.5, params)
    updates = update_once(tx, params, jax.tree.map(jnp.zeros_like, params))
    mask = tree.flatten(optimizer.decay_mask(params))
    for path, update in tree.flatten(updates).items():
        expected = -0.05 * tree.flatten(params)[path] if mask[path] else 0 * update
        close(update, expected)


def test_patterns_take_further_leaves_out_of_the_decay_and_a_misspelt_one_is_refused():
    params = random_tree(0)
    mask = tree.flatten(optimizer.decay_mask(params, (*optimizer.NO_DECAY, "embed/.*", "head/kernel")))
    assert {path for path, decays in mask.items() if decays} == {
        p for p in SHAPES if p.startswith("blocks") and "kernel" in p
    }
    with pytest.raises(ConfigError, match=r"heads/\.\*"):
        optimizer.make(Config(no_decay=("heads/.*",)), 0.1, params)


def test_the_gradient_is_clipped_over_all_leaves_together():
    params, grads = random_tree(0), random_tree(7)
    plain = Config("sgd", momentum=0.0, clip_norm=0.25)
    tx = optimizer.make(plain, 1.0, params)
    updates = update_once(tx, params, grads)
    norm = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads)))
    close(updates, jax.tree.map(lambda g: -g * 0.25 / norm, grads))


def test_layer_decay_scales_update_and_weight_decay_of_each_layer():
    params = random_tree(0)
    one = optimizer.make(Config("adamw", weight_decay=0.1), 0.5, params)
    scaled = optimizer.make(Config("adamw", weight_decay=0.1, layer_decay=0.5), 0.5, params)
    grads = random_tree(7)
    plain, found = (tree.flatten(update_once(tx, params, grads)) for tx in (one, scaled))
    by_layer = np.array([1 / 4, 1 / 2])
    for path, update in found.items():
        factor = {"embed": 1 / 8, "blocks": by_layer.reshape((-1,) + (1,) * (update.ndim - 1))}
        close(update, plain[path] * factor.get(path.split("/")[0], 1.0))
    with pytest.raises(ConfigError, match="layer_decay"):
        optimizer.make(Config(layer_decay=0.5), 0.1, {"head": params["head"]})


def test_first_step_of_a_warmup_from_zero_changes_nothing():
    params = random_tree(0)
    tx = optimizer.make(Config(), optax.linear_schedule(0.0, 1.0, 10), params)
    updates = update_once(tx, params, random_tree(7))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", optimizer.USUAL)
def test_other_numbers_keep_the_structure_of_the_state(name):
    params = jax.eval_shape(lambda: random_tree(0))
    one = optimizer.make(Config(name), optax.constant_schedule(1.0), params)
    other = Config(name, weight_decay=0.5, clip_norm=None, layer_decay=0.9, no_decay=())
    two = optimizer.make(other, optax.linear_schedule(0.0, 1.0, 10), params)
    shapes = [jax.eval_shape(tx.init, params) for tx in (one, two)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["lamb", "lars", "muon"])
def test_sharded_parameters_get_the_updates_of_whole_ones(name):
    params, grads = random_tree(0), random_tree(7)
    tx = optimizer.make(Config(name), 0.1, params)
    expected = update_once(tx, params, grads)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))

    def place(path, leaf):
        axes = (None, "fsdp", "tensor") if leaf.ndim == 3 else ()
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    params, grads = tree.map_with_path(place, params), tree.map_with_path(place, grads)
    with jax.set_mesh(mesh):
        found = update_once(tx, params, grads)
    close(found, expected, 2e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "adagrad"}, "adagrad"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"b1": 1.0}, "b1"),
        ({"b2": math.nan}, "b2"),
        ({"eps": 0.0}, "eps"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.01}, "layer_decay"),
        ({"momentum": 0.9}, "momentum is not read by adamw"),
        ({"name": "sgd", "b2": 0.9}, "b2 is not read by sgd"),
        ({"name": "adamw", "nesterov": True}, "nesterov is read by sgd with a momentum; unset it for adamw"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "nesterov is read by sgd with a momentum"),
        ({"name": "adafactor", "b1": 0.9}, "b1 is not read by adafactor"),
    ],
)
def test_numbers_out_of_range_or_without_effect_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        Config(**options)
