import errno
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, ConfigError, ResourceError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.optim import optimizer
from fm_jax.peft import lora
from tests.close import close

LAYERS, WIDTH = 3, 8
SHAPES = {
    "embed/tokens": (12, WIDTH),
    "blocks/attn/q/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/attn/q/bias": (LAYERS, WIDTH),
    "blocks/attn/v/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/mlp/up/kernel": (LAYERS, WIDTH, 20),
    "blocks/mlp/down/kernel": (LAYERS, 20, WIDTH),
    "proj/kernel": (WIDTH, 6),
    "head/kernel": (6, 3),
}
TARGETS = (r"blocks/attn/(q|v)/kernel", r"blocks/mlp/.*/kernel", r"proj/kernel")
CFG = lora.Config(rank=2, alpha=6.0, targets=TARGETS, trainable=("head/.*",))
KEY = jax.random.key(0)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return tree.unflatten({path: jnp.asarray(0.4 * rng.normal(size=s), jnp.float32) for path, s in SHAPES.items()})


def trained_long(trained, seed=3):
    """Return the tree with every leaf away from its start, as after training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), trained)


def loss(params):
    def layer(x, block):
        q, v = block["attn"]["q"], block["attn"]["v"]
        x = jnp.tanh(x @ q["kernel"] + q["bias"][None]) + x @ v["kernel"]
        return jnp.tanh(jnp.tanh(x @ block["mlp"]["up"]["kernel"]) @ block["mlp"]["down"]["kernel"]), None

    x, _ = jax.lax.scan(layer, params["embed"]["tokens"], params["blocks"])
    return jnp.mean(jnp.square(x @ params["proj"]["kernel"] @ params["head"]["kernel"] - 1.0))


@jax.jit
def grads_of(trained, frozen):
    return jax.grad(lambda part: loss(lora.combine(CFG)(part, frozen)))(trained)


def test_new_adapters_leave_every_bit_of_the_model_as_it_was():
    params = make_params()
    trained, frozen = lora.split(KEY, params, CFG)
    combine = lora.combine(CFG)
    for combined in (combine(trained, frozen), jax.jit(combine)(trained, frozen)):
        jax.tree.map(np.testing.assert_array_equal, combined, params)
    assert loss(lora.combine(CFG)(trained, frozen)) == loss(params)


def test_adapters_follow_their_matrices_in_shape_and_start():
    adapters = tree.flatten(lora.init(KEY, make_params(), CFG)["lora"])
    matrices = {path for path in SHAPES if path.endswith("kernel") and not path.startswith("head")}
    assert set(adapters) == {f"{path}/{part}" for path in matrices for part in "ab"}
    for path in matrices:
        *stack, rows, columns = SHAPES[path]
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        assert a.shape == (*stack, rows, 2) and b.shape == (*stack, 2, columns)
        assert not np.any(b)
        # kaiming-uniform with a = sqrt 5: bound sqrt(6 / ((1 + 5) fan_in)), reached by a large draw
        bound = (6 / (6 * rows)) ** 0.5
        assert 0.7 * bound < np.abs(a).max() <= bound
    wide = lora.init(KEY, {"proj": {"kernel": jnp.zeros((256, 4))}}, lora.Config(64, targets=("proj/.*",)))
    a = wide["lora"]["proj"]["kernel"]["a"]
    assert abs(float(a.mean())) < 1e-3 and abs(float(a.std()) - 1 / 16 / 3**0.5) < 1e-3


def test_a_second_set_of_adapters_is_refused():
    with pytest.raises(ConfigError, match="merge"):
        lora.init(KEY, {**make_params(), "lora": {}}, CFG)


def test_no_two_targets_and_no_two_layers_share_an_a():
    adapters = tree.flatten(lora.init(KEY, make_params(), CFG)["lora"])
    q, v = adapters["blocks/attn/q/kernel/a"], adapters["blocks/attn/v/kernel/a"]
    drawn = [layer for a in (q, v) for layer in np.asarray(a)]
    assert all(not np.any(one == two) for i, one in enumerate(drawn) for two in drawn[:i])
    alone = lora.init(KEY, make_params(), replace(CFG, targets=("blocks/attn/v/kernel",)))
    np.testing.assert_array_equal(alone["lora"]["blocks"]["attn"]["v"]["kernel"]["a"], v)


def test_alpha_over_rank_is_applied_once():
    trained, frozen = lora.split(KEY, make_params(), CFG)
    trained = trained_long(trained)
    merged = lora.merge(trained, frozen, CFG)
    for path in ("blocks/mlp/up/kernel", "proj/kernel"):
        a, b, base = (
            tree.flatten(t)[p] for t, p in ((trained, f"lora/{path}/a"), (trained, f"lora/{path}/b"), (frozen, path))
        )
        expected = np.asarray(base, np.float64) + 3.0 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        close(tree.flatten(merged)[path], expected)


def test_at_first_only_b_has_a_gradient_and_after_one_step_a_has_too():
    trained, frozen = lora.split(KEY, make_params(), CFG)
    for step in range(2):
        for path, grad in tree.flatten(grads_of(trained, frozen)).items():
            if step == 0 and path.endswith("/a"):
                assert not np.any(grad), path
            else:
                assert np.any(grad), path
        trained = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, trained, grads_of(trained, frozen))


def test_ten_steps_under_scan_train_adapters_and_head_only():
    params = make_params()
    trained, frozen = lora.split(KEY, params, CFG)
    tx = optimizer.make(optimizer.Config("adamw"), 0.01, trained)

    @jax.jit
    def run(trained, frozen):
        def step(carry, _):
            part, state = carry
            updates, state = tx.update(grads_of(part, frozen), state, part)
            return (optax.apply_updates(part, updates), state), loss(lora.combine(CFG)(part, frozen))

        return jax.lax.scan(step, (trained, tx.init(trained)), length=10)

    (new, state), losses = run(trained, frozen)
    assert losses[-1] < losses[0]
    assert set(tree.flatten(new)) == set(tree.flatten(trained))
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * tree.count(trained)
    after = tree.flatten(lora.merge(new, frozen, CFG))
    targets = {
        path.removeprefix("lora/").rpartition("/")[0] for path in tree.flatten(trained) if path.startswith("lora/")
    }
    for path, leaf in tree.flatten(params).items():
        if path in targets or path.startswith("head/"):
            assert np.any(after[path] != leaf), path
        else:
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)


def test_combine_copies_no_untouched_leaf_and_names_a_missing_matrix():
    trained, frozen = lora.split(KEY, make_params(), CFG)
    combined = lora.combine(CFG)(trained, frozen)
    assert combined["embed"]["tokens"] is frozen["embed"]["tokens"]
    assert combined["head"]["kernel"] is trained["head"]["kernel"]
    with pytest.raises(ValueError, match="proj/kernel"):
        lora.combine(CFG)(trained, {name: node for name, node in frozen.items() if name != "proj"})


def test_merge_and_unmerge_go_round():
    trained, frozen = lora.split(KEY, make_params(), CFG)
    trained = trained_long(trained)
    merged = lora.merge(trained, frozen, CFG)
    back = lora.unmerge(merged, trained, CFG)
    close(back, frozen)
    again = lora.merge(trained, back, CFG)
    close(again, merged)
    assert np.abs(merged["proj"]["kernel"] - frozen["proj"]["kernel"]).max() > 0.1
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    assert lora.merge(trained, half, CFG)["proj"]["kernel"].dtype == jnp.bfloat16


def test_sharded_adapters_lie_as_their_matrices_and_give_the_same_parameters():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {
        "blocks/mlp/up/kernel": (None, "fsdp", "tensor"),
        "proj/kernel": ("fsdp", "tensor"),
        "embed/tokens": ("fsdp",),
    }
    layout = tree.unflatten({path: NamedSharding(mesh, PartitionSpec(*axes.get(path, ()))) for path in SHAPES})
    trained, frozen = lora.split(KEY, make_params(), CFG)
    trained = trained_long(trained)
    expected = lora.merge(trained, frozen, CFG)
    where = lora.shardings(trained, layout)
    up, proj = where["lora"]["blocks"]["mlp"]["up"]["kernel"], where["lora"]["proj"]["kernel"]
    assert up["a"].spec == PartitionSpec(None, "fsdp", None) and up["b"].spec == PartitionSpec(None, None, "tensor")
    assert proj["a"].spec == PartitionSpec("fsdp", None) and proj["b"].spec == PartitionSpec(None, "tensor")
    placed = jax.device_put(trained, where)
    base = jax.device_put(frozen, tree.partition(layout, ("head/.*",))[1])
    with jax.set_mesh(mesh):
        found = jax.jit(lora.combine(CFG), out_shardings=layout)(placed, base)
        grads = grads_of(placed, base)
    close(found, expected)
    close(grads, grads_of(trained, frozen), 1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"targets": ("blocks/atn/q/kernel",)}, "nearest are blocks/attn/q/kernel"),
        ({"targets": (r".*/query/kernel", TARGETS[0])}, "query"),
        ({"targets": (r"blocks/attn/q/.*",)}, "blocks/attn/q/bias"),
        ({"trainable": ("classifier/.*",)}, "classifier"),
        ({"trainable": ("proj/.*",)}, "proj/kernel: both"),
    ],
)
def test_patterns_that_match_nothing_or_no_matrix_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        lora.split(KEY, make_params(), replace(CFG, **options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": float("nan")}, "lora.alpha"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("attn/(q",)}, "regular expression"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        lora.Config(**options)


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "adapter.safetensors"
    lora.save(file, lora.split(KEY, make_params(), CFG)[0], CFG)
    return file


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path):
    trained, _ = lora.split(KEY, make_params(), CFG)
    trained = trained_long(trained)
    trained["head"]["kernel"] = trained["head"]["kernel"].astype(jnp.bfloat16)
    # a transposed view: safetensors alone would write its memory, not its values
    up = trained["lora"]["blocks"]["mlp"]["up"]["kernel"]
    up["a"] = np.asfortranarray(np.asarray(up["a"]))
    assert not up["a"].flags.c_contiguous
    file = tmp_path / "new" / "adapter.safetensors"
    lora.save(file, trained, CFG)
    found, cfg = lora.load(file, make_params())
    assert cfg == CFG and jax.tree.structure(found) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, found, trained)
    assert found["head"]["kernel"].dtype == jnp.bfloat16
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_and_no_other(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ResourceError, match=r"adapter\.safetensors cannot be written: no space"):
        lora.save(saved, lora.init(jax.random.key(1), make_params(), CFG), CFG)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


DAMAGE = {  # what is done to a good file -> what the message must say
    "rank": (lambda flat, meta: meta.update(rank="4"), "rank"),
    "kind": (lambda flat, meta: meta.update(format="pt"), "format"),
    "config": (lambda flat, meta: meta.pop("alpha"), "alpha"),
    "half": (lambda flat, meta: flat.pop("lora/proj/kernel/b"), "proj/kernel/b"),
    "extra": (lambda flat, meta: flat.update({"ghost/kernel": np.zeros(2, np.float32)}), "ghost/kernel"),
    "shape": (lambda flat, meta: flat.update({"head/kernel": np.zeros((6, 4), np.float32)}), "head/kernel"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_contradicts_itself_or_the_model_is_refused(saved, damage, named):
    lora.load(saved, make_params())  # undamaged, it is accepted
    with safe_open(saved, framework="numpy") as file:
        flat, meta = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    damage(flat, meta)
    save_file(flat, saved, metadata=meta)
    with pytest.raises(CheckpointError, match=named):
        lora.load(saved, make_params())


def test_an_adapter_of_another_base_is_refused_by_the_name_of_its_leaf(saved):
    other = make_params()
    other["blocks"]["mlp"]["up"]["kernel"] = jnp.zeros((LAYERS, WIDTH, 24))
    with pytest.raises(CheckpointError, match=r"blocks/mlp/up/kernel is \[3, 8, 24\]"):
        lora.load(saved, other)
    del other["blocks"]["mlp"]
    with pytest.raises(CheckpointError, match=r"blocks/mlp/down/kernel has an adapter"):
        lora.load(saved, other)


def test_a_missing_or_cut_file_is_refused(saved):
    with pytest.raises(CheckpointError, match="no adapter file"):
        lora.load(saved.with_name("other.safetensors"), make_params())
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .* as safetensors"):
        lora.load(saved, make_params())
