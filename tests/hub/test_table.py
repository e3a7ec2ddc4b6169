"""Which tensor of a file is read for which leaf, and written from it; how it gets there is in test_fill.py."""

import re
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.hub import table
from fm_jax.hub.files.weights import Arrays
from fm_jax.hub.table import Table, same
from tests.hub.tables import SHAPES, TABLE, Counting, D, F, V, assert_equal, params, theirs, wanted


def refused(arrays, *said, names=TABLE, want=None):
    with pytest.raises(CheckpointError) as error:
        table.read(names, wanted() if want is None else want, Arrays(arrays, "some/folder"))
    text = str(error.value)
    assert text.startswith("some/folder does not fit the model")
    assert "\n" not in text
    for part in said:
        assert part in text
    return text


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


def test_arrays_hand_out_copies():
    array = np.arange(6.0).reshape(2, 3)
    found = Arrays({"a": array}).read("a", (slice(0, 2), slice(1, 3)))
    assert np.array_equal(found, array[:, 1:])
    assert not np.shares_memory(found, array)


def test_older_names_and_tensors_that_are_no_parameters_are_understood():
    arrays = theirs()
    old = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    old |= {"h.0.attn.masked_bias": np.array(-1e4), "transformer.h.0.attn.bias": np.zeros((1, 1, 4, 4))}
    assert_equal(table.read(TABLE, wanted(), Arrays(old)), params())
    assert TABLE.current("wte.weight") == "transformer.wte.weight"
    assert TABLE.current("lm_head.weight") == "lm_head.weight"
    assert TABLE.current("h.0.ln_1.gamma") == "transformer.h.0.ln_1.weight"  # one rename after the other
    old = {re.sub(r"(ln_\w+)\.weight", r"\1.gamma", name): array for name, array in old.items()}
    assert "h.2.ln_1.gamma" in old and "h.2.ln_1.weight" not in old
    assert_equal(table.read(TABLE, wanted(), Arrays(old)), params())


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
        theirs() | {"transformer.h.3.ln_1.weight": np.zeros(D)},
        "h.3.ln_1.weight: stored, but the model has no such parameter",
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
    refused(arrays, "lm_head.weight: stored as int8, which cannot be read as float32")


def test_a_tensor_stored_under_an_old_and_a_new_name_is_told():
    arrays = theirs()
    arrays["wte.weight"] = arrays["transformer.wte.weight"]
    refused(arrays, "transformer.wte.weight: stored twice, as transformer.wte.weight and wte.weight")


def test_a_table_that_names_a_leaf_twice_or_not_at_all_is_told():
    twice = replace(TABLE, entries=(*TABLE.entries, same("embed/tokens", "other.weight")))
    refused(theirs() | {"other.weight": np.zeros((V, D))}, "embed/tokens: it is in the name table twice", names=twice)
    less = replace(TABLE, entries=TABLE.entries[1:])
    refused(theirs(), "embed/tokens: it is not in the name table", names=less)


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
    for said in ("5 problems", "not stored", "no such parameter", "the config wants", "stored twice", "as float32"):
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
