"""What reading puts on the devices, where, and in which steps; which names it reads is in test_table.py."""

import re
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.hub import table
from fm_jax.hub.files import fill, safetensors, stored
from fm_jax.hub.files.weights import Arrays
from fm_jax.hub.table import Table, flipped, same
from tests.hub.tables import AXES, SHAPES, TABLE, Counting, D, F, L, assert_equal, params, theirs, wanted


@pytest.fixture(autouse=True, params=[False, True], ids=["together", "streamed"])
def streamed(request, monkeypatch):
    """Every test below runs with leaves put together on the host, and layer by layer on the device."""
    if request.param:
        monkeypatch.setattr(fill, "_WHOLE", 0)
        monkeypatch.setattr(fill, "_in_host_memory", lambda where: False)  # as on an accelerator
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_written_reads_back_equal(dtype):
    assert_equal(table.read(TABLE, wanted(dtype), Arrays(theirs(dtype))), params(dtype))


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
    writer = fill._layer_writer

    def watched(*args):
        start, put = writer(*args)

        def putting(array, layer, number):
            found = put(array, layer, number)
            calls.append(array.is_deleted())
            return found

        return start, putting

    monkeypatch.setattr(fill, "_layer_writer", watched)
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


def test_a_leaf_above_the_limit_is_streamed_and_one_at_the_limit_is_not(streamed, monkeypatch):
    started = []
    writer = fill._layer_writer
    monkeypatch.setattr(fill, "_layer_writer", lambda shape, *args: (started.append(shape), writer(shape, *args))[1])
    monkeypatch.setattr(fill, "_WHOLE", L * D * D * 4)
    monkeypatch.setattr(fill, "_in_host_memory", lambda where: False)
    table.read(TABLE, wanted(), Arrays(theirs()))
    assert started == [(L, D, F)]


def test_a_cpu_keeps_the_memory_that_leaves_were_put_together_in(streamed, monkeypatch):
    made, aligned = [], fill.aligned
    monkeypatch.setattr(fill, "aligned", lambda *args: (made.append(aligned(*args)), made[-1])[1])
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


def test_the_caches_of_compiled_writers_serve_layers_of_one_shape():
    fill._layer_writer.cache_clear()
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start, put = fill._layer_writer((2, 3), "float32", where)
    made = put(put(start(), jnp.ones(3), 1), 2 * jnp.ones(3), 0)
    assert made.tolist() == [[2, 2, 2], [1, 1, 1]]
    assert put._cache_size() == 1
    assert fill._layer_writer((2, 3), "float32", where)[1] is put
