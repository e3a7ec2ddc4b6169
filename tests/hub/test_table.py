import re
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.hub import safetensors, shards, stored, table
from fm_jax.hub.table import Arrays, Entry, Table, flipped, linear, norm, same

L, D, F, V = 3, 8, 16, 24
TABLE = Table(
    (
        same("embed/tokens", "transformer.wte.weight"),
        *norm("norm_final", "transformer.ln_f"),
        *norm("blocks/norm", "transformer.h.{}.ln_1"),
        *(
            Entry(f"blocks/attn/{head}/{ours}", f"transformer.h.{{}}.attn.c_attn.{theirs}", part=part, parts=3)
            for part, head in enumerate("qkv")
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        *linear("blocks/mlp/up", "transformer.h.{}.mlp.up"),
        flipped("head/kernel", "lm_head.weight"),
        Entry("conv/kernel", "conv.weight", axes=(2, 3, 1, 0)),  # HWIO from OIHW
        Entry("first", "first_token", singles=2),
        *(
            Entry(f"blocks/{ours}/kernel", "transformer.h.{}.both.weight", axes=(1, 0), part=part, parts=2, singles=1)
            for part, ours in enumerate(("gate", "into"))
        ),
        *linear("absent", "transformer.absent"),
    ),
    rename=((r"((?:wte|ln_f|h\.\d+)\..*)", r"transformer.\1"), (r"(.*)\.gamma", r"\1.weight")),
    skip=(r".*\.masked_bias", r"transformer\.h\.\d+\.attn\.bias"),
    tied=(("copy.weight", "transformer.wte.weight"),),
)
SHAPES = {
    "embed/tokens": (V, D),
    "norm_final/scale": (D,),
    "norm_final/bias": (D,),
    "blocks/norm/scale": (L, D),
    "blocks/norm/bias": (L, D),
    **{f"blocks/attn/{head}/kernel": (L, D, D) for head in "qkv"},
    **{f"blocks/attn/{head}/bias": (L, D) for head in "qkv"},
    "blocks/mlp/up/kernel": (L, D, F),
    "blocks/mlp/up/bias": (L, F),
    "head/kernel": (D, V),
    "conv/kernel": (2, 3, 4, D),
    "first": (D,),
    "blocks/gate/kernel": (L, D, F // 2),
    "blocks/into/kernel": (L, D, F // 2),
}
AXES = {  # as the model's rules would cut them on a mesh of fsdp=2, tensor=4
    "embed/tokens": ("tensor", "fsdp"),
    **{f"blocks/attn/{head}/kernel": (None, "fsdp", "tensor") for head in "qkv"},
    **{f"blocks/attn/{head}/bias": (None, "tensor") for head in "qkv"},
    "blocks/mlp/up/kernel": (None, "fsdp", "tensor"),
    "blocks/mlp/up/bias": (None, "tensor"),
    "head/kernel": ("fsdp", "tensor"),
    "conv/kernel": (None, None, "fsdp", "tensor"),
    "first": ("fsdp",),
    "blocks/gate/kernel": (None, "fsdp", "tensor"),
    "blocks/into/kernel": (None, "fsdp", "tensor"),
}


class Counting:
    """Weights that remember every read."""

    def __init__(self, weights):
        self.weights, self.where, self.reads = weights, weights.where, []

    @property
    def specs(self):
        return self.weights.specs

    def read(self, name, index, out=None):
        found = self.weights.read(name, index, out)
        self.reads.append((name, found.size))
        return found


@pytest.fixture(autouse=True, params=[False, True], ids=["together", "streamed"])
def streamed(request, monkeypatch):
    """Every test below runs with leaves put together on the host, and layer by layer on the device."""
    if request.param:
        monkeypatch.setattr(shards, "_WHOLE", 0)
        monkeypatch.setattr(shards, "_in_host_memory", lambda where: False)  # as on an accelerator
    return request.param


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return tree.unflatten({path: rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()})


def wanted(dtype=np.float32, mesh=None, shapes=SHAPES):
    def leaf(path, shape):
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec(*AXES.get(path, ())))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    return tree.unflatten({path: leaf(path, shape) for path, shape in shapes.items()})


def theirs(dtype=np.float32):
    return dict(table.write(TABLE, params(dtype)))


def assert_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert np.array_equal(np.asarray(found[path]), leaf), path


def refused(arrays, *said, names=TABLE, want=None):
    with pytest.raises(CheckpointError) as error:
        table.read(names, wanted() if want is None else want, Arrays(arrays, "some/folder"))
    text = str(error.value)
    assert text.startswith("some/folder does not fit the model")
    assert "\n" not in text
    for part in said:
        assert part in text
    return text


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_written_reads_back_equal(dtype):
    assert_equal(table.read(TABLE, wanted(dtype), Arrays(theirs(dtype))), params(dtype))


def test_their_tensors_are_laid_out_as_torch_lays_them_out():
    ours, found = tree.flatten(params()), theirs()
    fused = [ours[f"blocks/attn/{head}/kernel"][1] for head in "qkv"]
    assert np.array_equal(found["transformer.h.1.attn.c_attn.weight"], np.concatenate(fused, axis=1))
    assert np.array_equal(found["transformer.h.2.mlp.up.weight"], ours["blocks/mlp/up/kernel"][2].T)
    assert np.array_equal(found["conv.weight"], np.einsum("hwio->oihw", ours["conv/kernel"]))
    assert found["conv.weight"].shape == (D, 4, 2, 3)
    assert np.array_equal(found["first_token"], ours["first"][None, None])
    both = [ours[f"blocks/{name}/kernel"][1].T for name in ("gate", "into")]
    assert np.array_equal(found["transformer.h.1.both.weight"], np.concatenate(both)[None])
    assert all(array.flags.c_contiguous for array in found.values())
    assert "transformer.absent.weight" not in found


def test_the_parts_of_a_fused_tensor_stand_in_their_order_whatever_the_tables():
    backwards = replace(TABLE, entries=TABLE.entries[::-1])
    found = dict(table.write(backwards, params()))
    assert all(np.array_equal(found[name], array) for name, array in theirs().items())
    assert_equal(table.read(backwards, wanted(), Arrays(found)), params())


def test_specs_foretell_what_is_written():
    for given in (params(ml_dtypes.bfloat16), wanted(ml_dtypes.bfloat16)):
        foretold = table.specs(TABLE, given)
        assert foretold == Arrays(theirs(ml_dtypes.bfloat16)).specs
        assert list(foretold) != []


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
def test_the_way_through_files_is_exact(tmp_path, shard_bytes):
    safetensors.write(tmp_path, table.specs(TABLE, params()), table.write(TABLE, params()), shard_bytes=shard_bytes)
    assert_equal(table.read(TABLE, wanted(), stored.open_weights(tmp_path)), params())


@pytest.mark.parametrize("half", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_fill_float32_exactly_and_back_rounded(half):
    found = table.read(TABLE, wanted(np.float32), Arrays(theirs(half)))
    assert_equal(found, jax.tree.map(lambda leaf: leaf.astype(np.float32), params(half)))
    assert_equal(table.read(TABLE, wanted(half), Arrays(theirs())), params(half))


def test_a_number_too_large_for_float16_is_an_error_that_names_the_leaf():
    arrays = theirs()
    arrays["transformer.h.1.mlp.up.weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match="blocks/mlp/up/kernel holds a number too large for float16"):
        table.read(TABLE, wanted(np.float16), Arrays(arrays))
    table.read(TABLE, wanted(ml_dtypes.bfloat16), Arrays(arrays))


def test_sharded_reading_is_equal_and_reads_no_more_than_one_layers_share(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    safetensors.write(tmp_path, table.specs(TABLE, params()), table.write(TABLE, params()))
    counting = Counting(stored.open_weights(tmp_path))
    found = table.read(TABLE, wanted(mesh=mesh), counting)
    assert_equal(found, params())
    cuts = {"fsdp": 2, "tensor": 4, None: 1}
    for path, leaf in tree.flatten(found).items():
        spec = PartitionSpec(*AXES.get(path, ()))
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), path
        (entry,) = (entry for entry in TABLE.entries if entry.path == path)
        share = np.prod(leaf.shape[1:] if entry.stacked else leaf.shape) / np.prod([cuts[axis] for axis in spec])
        name = re.compile(re.escape(entry.name).replace(r"\{\}", r"\d+"))
        sizes = [size for read, size in counting.reads if name.fullmatch(read)]
        assert sizes, path
        assert max(sizes) <= share, path


def test_what_several_devices_hold_is_read_once_and_may_be_donated():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    counting = Counting(Arrays(theirs()))
    found = table.read(TABLE, wanted(mesh=mesh), counting)
    assert_equal(found, params())
    reads = [name for name, _ in counting.reads]
    assert reads.count("transformer.wte.weight") == 2
    assert reads.count("transformer.h.1.mlp.up.weight") == 2
    assert reads.count("transformer.ln_f.bias") == 1
    add = jax.jit(lambda leaves: jax.tree.map(lambda x: x + 1, leaves), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = add(found)
    for path, leaf in tree.flatten(moved).items():
        for shard in leaf.addressable_shards:
            assert np.array_equal(shard.data, tree.flatten(params())[path][shard.index] + np.float32(1)), path


def test_a_leaf_cut_over_its_layers_is_read_layer_by_layer():
    mesh = make_mesh(MeshConfig(fsdp=8))
    names = Table((flipped("blocks/kernel", "h.{}.weight"),))
    arrays = {f"h.{n}.weight": np.full((6, 5), n, np.float32) + np.arange(5, dtype=np.float32) for n in range(8)}
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    found = table.read(
        names, {"blocks": {"kernel": jax.ShapeDtypeStruct((8, 5, 6), np.float32, sharding=where)}}, Arrays(arrays)
    )
    assert found["blocks"]["kernel"].sharding.is_equivalent_to(where, 3)
    assert np.array_equal(found["blocks"]["kernel"], [arrays[f"h.{n}.weight"].T for n in range(8)])


def test_layers_are_put_in_place_and_every_donation_is_used(streamed, monkeypatch):
    calls = []
    writer = shards._layer_writer

    def watched(*args):
        start, put = writer(*args)

        def putting(array, layer, number):
            found = put(array, layer, number)
            calls.append(array.is_deleted())
            return found

        return start, putting

    monkeypatch.setattr(shards, "_layer_writer", watched)
    for mesh in (None, make_mesh(MeshConfig(fsdp=2, tensor=4))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_equal(table.read(TABLE, wanted(mesh=mesh), Arrays(theirs())), params())
    stacked = sum(path.startswith("blocks/") for path in SHAPES)
    assert calls == [True] * (2 * L * stacked if streamed else 0)


def test_what_was_read_may_be_donated_and_stays_when_the_source_changes():
    arrays = theirs()
    found = table.read(TABLE, wanted(), Arrays(arrays))
    for array in arrays.values():
        array[...] = 0
    assert_equal(found, params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = jax.jit(lambda leaf: jax.tree.map(lambda x: x + 1, leaf), donate_argnums=0)(found)
    assert_equal(moved, jax.tree.map(lambda leaf: leaf + np.float32(1), params()))


def test_arrays_hand_out_copies():
    array = np.arange(6.0).reshape(2, 3)
    found = Arrays({"a": array}).read("a", (slice(0, 2), slice(1, 3)))
    assert np.array_equal(found, array[:, 1:])
    assert not np.shares_memory(found, array)


def test_a_leaf_above_the_limit_is_streamed_and_one_at_the_limit_is_not(streamed, monkeypatch):
    started = []
    writer = shards._layer_writer
    monkeypatch.setattr(shards, "_layer_writer", lambda shape, *args: (started.append(shape), writer(shape, *args))[1])
    monkeypatch.setattr(shards, "_WHOLE", L * D * D * 4)
    monkeypatch.setattr(shards, "_in_host_memory", lambda where: False)
    table.read(TABLE, wanted(), Arrays(theirs()))
    assert started == [(L, D, F)]


def test_a_cpu_keeps_the_memory_that_leaves_were_put_together_in(streamed, monkeypatch):
    made, aligned = [], shards.aligned
    monkeypatch.setattr(shards, "aligned", lambda *args: (made.append(aligned(*args)), made[-1])[1])
    found = table.read(TABLE, wanted(), Arrays(theirs()))
    stacked = [leaf for path, leaf in tree.flatten(found).items() if path.startswith("blocks/")]
    kept = {leaf.unsafe_buffer_pointer() for leaf in stacked} & {array.ctypes.data for array in made}
    assert len(kept) == (0 if streamed else len(stacked))


def test_one_layer_and_none_at_all_are_read():
    names = Table((flipped("blocks/kernel", "h.{}.weight"),))
    one = {"blocks": {"kernel": jax.ShapeDtypeStruct((1, 2, 3), np.float32)}}
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(table.read(names, one, Arrays({"h.0.weight": array}))["blocks"]["kernel"], array.T[None])
    scalar = {"scale": jax.ShapeDtypeStruct((), np.float32)}
    found = table.read(
        Table((same("scale", "logit_scale"),)), scalar, Arrays({"logit_scale": np.array(4.5, np.float32)})
    )
    assert found["scale"].shape == ()
    assert found["scale"] == 4.5


def test_older_names_and_tensors_that_are_no_parameters_are_understood():
    arrays = theirs()
    old = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    old |= {"h.0.attn.masked_bias": np.array(-1e4), "transformer.h.0.attn.bias": np.zeros((1, 1, 4, 4))}
    assert_equal(table.read(TABLE, wanted(), Arrays(old)), params())
    assert TABLE.current("wte.weight") == "transformer.wte.weight"
    assert TABLE.current("lm_head.weight") == "lm_head.weight"


def test_a_tied_copy_that_is_equal_is_passed_over_and_one_that_differs_is_told():
    arrays = theirs()
    arrays["copy.weight"] = arrays["transformer.wte.weight"].copy()
    assert_equal(table.read(TABLE, wanted(), Arrays(arrays)), params())
    arrays["copy.weight"][-1, -1] += 1
    refused(arrays, "1 problem: copy.weight differs from transformer.wte.weight")
    arrays["copy.weight"] = arrays["transformer.wte.weight"][:-1]
    refused(arrays, "copy.weight differs from transformer.wte.weight")


def test_a_tied_copy_is_compared_in_blocks():
    names = Table((same("a", "a"),), tied=(("b", "a"),))
    tall, wide, vector, one = (2**13 + 5, 2**10), (3, 2**22 + 1), (2**23,), ()
    for shape in (tall, wide, vector, one):
        rows = list(table._rows(shape))
        covered = np.zeros(shape, np.int8)
        for index in rows:
            covered[index] += 1
        assert (covered == 1).all()
    arrays = {"a": np.zeros(tall, np.float32), "b": np.zeros(tall, np.float32)}
    arrays["b"][-1, -1] = 1
    counting = Counting(Arrays(arrays))
    with pytest.raises(CheckpointError, match="b differs from a"):
        table.read(names, {"a": jax.ShapeDtypeStruct(tall, np.float32)}, counting)
    assert max(size for _, size in counting.reads) <= 1 << 22


def test_a_missing_tensor_is_told_with_what_it_is_for():
    arrays = theirs()
    del arrays["transformer.h.2.mlp.up.weight"], arrays["lm_head.weight"]
    refused(
        arrays,
        "2 problems",
        "transformer.h.2.mlp.up.weight (for blocks/mlp/up/kernel): not stored",
        "lm_head.weight (for head/kernel): not stored",
    )


def test_a_missing_fused_tensor_is_told_for_each_of_its_parts():
    arrays = theirs()
    del arrays["transformer.h.0.attn.c_attn.bias"]
    refused(arrays, *(f"c_attn.bias (for blocks/attn/{head}/bias): not stored" for head in "qkv"))


def test_a_tensor_left_over_is_told():
    refused(
        theirs() | {"transformer.h.3.ln_1.weight": np.zeros(D)}, "h.3.ln_1.weight: stored, but the model has no place"
    )


def test_a_wrong_shape_is_told_in_their_layout():
    arrays = theirs()
    arrays["transformer.h.1.mlp.up.weight"] = arrays["transformer.h.1.mlp.up.weight"].T.copy()
    refused(arrays, f"transformer.h.1.mlp.up.weight: stored as [{D}, {F}], the config wants [{F}, {D}]")
    arrays = theirs()
    arrays["transformer.h.0.attn.c_attn.weight"] = np.zeros((D, D))
    refused(arrays, f"stored as [{D}, {D}], the config wants [{D}, {3 * D}]")


def test_whole_numbers_are_not_taken_for_weights():
    arrays = theirs()
    arrays["lm_head.weight"] = np.ones((V, D), np.int8)
    refused(arrays, "lm_head.weight: stored as int8, which is no float32")


def test_a_tensor_stored_under_an_old_and_a_new_name_is_told():
    arrays = theirs()
    arrays["wte.weight"] = arrays["transformer.wte.weight"]
    refused(arrays, "transformer.wte.weight: stored twice, as transformer.wte.weight and as wte.weight")


def test_a_table_that_names_a_leaf_twice_or_not_at_all_is_told():
    twice = replace(TABLE, entries=(*TABLE.entries, same("embed/tokens", "other.weight")))
    refused(theirs() | {"other.weight": np.zeros((V, D))}, "embed/tokens: the table names it twice", names=twice)
    less = replace(TABLE, entries=TABLE.entries[1:])
    refused(theirs(), "embed/tokens: the table has no name for it", names=less)


def test_one_tensor_read_for_two_leaves_is_told():
    names = Table((same("a", "x"), same("b", "x")))
    want = {name: jax.ShapeDtypeStruct((2,), np.float32) for name in "ab"}
    refused({"x": np.zeros(2)}, "x: read for a, b", names=names, want=want)


def test_a_fused_tensor_of_which_the_model_lacks_a_part_is_told():
    shapes = {path: shape for path, shape in SHAPES.items() if path != "blocks/attn/k/bias"}
    refused(theirs(), "c_attn.bias: read for blocks/attn/q/bias, blocks/attn/v/bias", want=wanted(shapes=shapes))


def test_all_that_does_not_fit_comes_in_one_message_before_a_number_is_read():
    arrays = theirs()
    del arrays["lm_head.weight"]
    arrays["left.over"] = np.zeros(1)
    arrays["conv.weight"] = np.zeros((1, 2))
    arrays["wte.weight"] = arrays["transformer.wte.weight"]
    arrays["transformer.ln_f.bias"] = np.zeros(D, np.int32)
    counting = Counting(Arrays(arrays))
    with pytest.raises(CheckpointError) as error:
        table.read(TABLE, wanted(), counting)
    assert not counting.reads
    for said in ("5 problems", "not stored", "no place for it", "the config wants", "stored twice", "no float32"):
        assert said in str(error.value)


def test_a_long_list_is_cut_and_counted():
    text = refused({}, "and ")
    assert len(text) < 1200
    assert int(re.search(r"and (\d+) more", text)[1]) > 5


def test_a_hundred_thousand_strangers_are_told_quickly():
    arrays = dict.fromkeys((f"x{n}" for n in range(100_000)), np.zeros(1, np.float32))
    with pytest.raises(CheckpointError, match="100000 problems"):
        table.read(Table(()), {}, Arrays(arrays))


def test_a_leaf_without_a_name_is_not_written():
    more = {**params(), "extra": {"kernel": np.zeros(2)}}
    with pytest.raises(CheckpointError, match="no stored name for extra/kernel"):
        next(table.write(TABLE, more))


def test_tensors_are_written_one_at_a_time_from_sharded_parameters():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    found = table.read(TABLE, wanted(mesh=mesh), Arrays(theirs()))
    again = table.write(TABLE, found)
    first = next(again)
    assert first[0] == "transformer.wte.weight"
    rest = dict([first, *again])
    assert all(np.array_equal(rest[name], array) for name, array in theirs().items())
    assert rest.keys() == theirs().keys()


def test_a_model_below_a_prefix_has_the_same_names():
    moved = TABLE.under("backbone", same("score/kernel", "score.weight"), tied=())
    given = {"backbone": params(), "score": {"kernel": np.ones((2, D), np.float32)}}
    want = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
    arrays = dict(table.write(moved, given))
    assert arrays.keys() == theirs().keys() | {"score.weight"}
    assert_equal(table.read(moved, want, Arrays(arrays)), given)
    assert moved.tied == ()
    assert moved.skip == TABLE.skip


def test_the_caches_of_compiled_writers_serve_layers_of_one_shape():
    shards._layer_writer.cache_clear()
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start, put = shards._layer_writer((2, 3), "float32", where)
    made = put(put(start(), jnp.ones(3), 1), 2 * jnp.ones(3), 0)
    assert made.tolist() == [[2, 2, 2], [1, 1, 1]]
    assert put._cache_size() == 1
    assert shards._layer_writer((2, 3), "float32", where)[1] is put
