import json

import jax.numpy as jnp
import msgpack as library
import numpy as np
import pytest
from flax import serialization

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import msgpack, stored
from fm_jax.hub.files.weights import Spec

rng = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def saved(tmp_path, tree):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(tree if isinstance(tree, bytes) else serialization.to_bytes(tree))
    return path


def everything(weights):
    return {
        name: weights.read(name, tuple(slice(0, size) for size in spec.shape)) for name, spec in weights.specs.items()
    }


def nested(path, leaf):
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def packed(value, code=1):
    return library.packb(nested("a/b", library.ExtType(code, library.packb(value))))


@pytest.mark.parametrize(
    ("path", "shape", "name", "turned"),
    [
        ("transformer/h/0/attn/c_attn/kernel", (12, 4), "transformer.h.0.attn.c_attn.weight", (1, 0)),
        ("transformer/h/11/ln_1/scale", (4,), "transformer.h.11.ln_1.weight", (0,)),
        ("transformer/wte/embedding", (9, 4), "transformer.wte.weight", (0, 1)),
        (
            "bert/encoder/layer/0/attention/self/query/kernel",
            (4, 6),
            "bert.encoder.layer.0.attention.self.query.weight",
            (1, 0),
        ),
        ("bert/embeddings/LayerNorm/bias", (4,), "bert.embeddings.LayerNorm.bias", (0,)),
        ("cls/predictions/bias", (9,), "cls.predictions.bias", (0,)),
        ("shared/embedding", (9, 4), "shared.weight", (0, 1)),
        (
            "encoder/block/0/layer/0/SelfAttention/q/kernel",
            (4, 6),
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            (1, 0),
        ),
        ("encoder/final_layer_norm/weight", (4,), "encoder.final_layer_norm.weight", (0,)),
        (
            "vit/embeddings/patch_embeddings/projection/kernel",
            (2, 3, 4, 5),
            "vit.embeddings.patch_embeddings.projection.weight",
            (3, 2, 0, 1),
        ),
        ("conv_layers/0/conv/kernel", (3, 4, 5), "conv_layers.0.conv.weight", (2, 1, 0)),
        ("params/dense/kernel", (2, 3), "dense.weight", (1, 0)),
        ("batch_stats/norm/mean", (3,), "norm.running_mean", (0,)),
        ("batch_stats/norm/var", (3,), "norm.running_var", (0,)),
        ("logit_scale", (), "logit_scale", ()),
    ],
)
def test_a_leaf_comes_under_the_name_and_in_the_layout_of_torch(tmp_path, path, shape, name, turned):
    array = draw(*shape) if shape else np.array(2.5, np.float32)
    weights = msgpack.open_file(saved(tmp_path, nested(path, array)))
    expected = array.transpose(turned)
    assert weights.specs == {name: Spec("float32", expected.shape)}
    assert np.array_equal(everything(weights)[name], expected)


def test_parts_of_a_turned_tensor_are_parts_of_its_torch_layout(tmp_path):
    array = draw(2, 3, 4, 5)
    weights = msgpack.open_file(saved(tmp_path, {"conv": {"kernel": array}}))
    index = (slice(1, 4), slice(2, 3), slice(0, 2), slice(1, 3))
    assert np.array_equal(weights.read("conv.weight", index), array.transpose(3, 2, 0, 1)[index])


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
)
def test_every_dtype_comes_back_with_its_bits(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    found = everything(msgpack.open_file(saved(tmp_path, {"a": array, "b": {"scale": array[0, 1]}})))
    assert found["a"].tobytes() == array.tobytes()
    assert found["a"].dtype == array.dtype
    assert found["b.weight"].shape == ()
    assert found["b.weight"] == array[0, 1]


def test_chunks_join_across_their_borders(tmp_path, monkeypatch):
    array = draw(50, 7)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    data = serialization.to_bytes({"t": {"embedding": array}, "small": draw(3)})
    assert data.count(b"float32") > 10
    weights = msgpack.open_file(saved(tmp_path, data))
    assert np.array_equal(everything(weights)["t.weight"], array)
    assert np.array_equal(weights.read("t.weight", (slice(3, 20), slice(2, 5))), array[3:20, 2:5])


def test_names_and_lists_of_every_length_are_read(tmp_path):
    tree = {"n" * size: draw(2) for size in (1, 31, 32, 255, 256, 512)}
    tree["many"] = {f"k{n}": {} for n in range(70_000)}
    tree["few"] = {f"k{n}": draw(1) for n in range(300)}
    tree["sizes"] = {str(size): draw(size) for size in (1, 2, 50, 60, 300, 20_000)}
    tree["axes"] = np.zeros((1,) * 20)
    weights = msgpack.open_file(saved(tmp_path, tree))
    assert len(weights.specs) == 6 + 300 + 6 + 1
    assert np.array_equal(weights.read("sizes.20000", (slice(0, 20_000),)), tree["sizes"]["20000"])
    assert np.array_equal(weights.read("n" * 512, (slice(0, 2),)), tree["n" * 512])


def test_what_flax_restores_is_what_is_read(tmp_path):
    tree = {
        "a": {"kernel": draw(3, 4), "bias": draw(4)},
        "b": {"layers": {str(n): {"scale": draw(2)} for n in range(12)}},
    }
    path = saved(tmp_path, tree)
    restored = serialization.msgpack_restore(path.read_bytes())
    found = everything(msgpack.open_file(path))
    assert np.array_equal(found["a.weight"], restored["a"]["kernel"].T)
    assert np.array_equal(found["b.layers.11.weight"], restored["b"]["layers"]["11"]["scale"])
    assert len(found) == 14


def test_a_number_that_is_not_finite_is_refused_by_its_flax_path_unless_allowed(tmp_path):
    path = saved(tmp_path, {"a": {"kernel": np.array([[1, np.nan]], np.float32)}})
    with pytest.raises(CheckpointError, match="a/kernel holds an infinity or a NaN"):
        everything(msgpack.open_file(path))
    assert np.isnan(everything(msgpack.open_file(path, allow_nonfinite=True))["a.weight"]).sum() == 1


GOOD = [[2], "float32", b"\0" * 8]
BAD = {
    "empty": (b"", "cut short"),
    "a list": (library.packb([1, 2]), "holds a list, not a map"),
    "a number": (b"\x05", "holds a number, not a map"),
    "trailing": (packed(GOOD) + b"\0", "1 extra bytes at its end"),
    "nil": (library.packb({"a": None}), "holds a value of kind 0xc0 as 'a'"),
    "false": (library.packb({"a": False}), "holds a value of kind 0xc2 as 'a'"),
    "true": (library.packb({"a": True}), "holds a number as 'a'"),
    "float": (library.packb({"a": 1.5}), "holds a value of kind 0xcb"),
    "negative": (library.packb({"a": -1}), "holds a value of kind 0xff"),
    "integer": (library.packb({"a": 7}), "holds a number as 'a'"),
    "words": (library.packb({"a": "word"}), "holds a text as 'a'"),
    "bytes": (library.packb({"a": b"word"}), "holds a bytes as 'a'"),
    "list": (library.packb({"a": [1]}), "holds a list as 'a'"),
    "number as name": (library.packb({1: {}}), "instead of a name"),
    "name that is not UTF-8 text": (b"\x81\xa1\xff\x80", "name that is not UTF-8 text"),
    "long name": (library.packb({"a" * 513: {}}), "instead of a name"),
    "climbing name": (serialization.to_bytes({"..": {"a": np.zeros(2)}}), "not a valid tensor name"),
    "spaced name": (serialization.to_bytes({"a b": np.zeros(2)}), "not a valid tensor name"),
    "twice": (b"\x82\xa1a\x80\xa1a\x80", "'a' twice in one map"),
    "complex": (serialization.msgpack_serialize({"a": 1j}), "holds extension 2 as 'a'"),
    "unknown extension": (packed(GOOD, code=99), "extension 99"),
    "not three": (packed(GOOD[:2]), "not an array of plain numbers"),
    "shape is a number": (packed([2, *GOOD[1:]]), "not a list"),
    "negative shape": (packed([[-2], *GOOD[1:]]), "not a number"),
    "huge shape": (packed([[1 << 41, 0], "float32", b""]), "not a number"),
    "33 axes": (packed([[1] * 33, "float32", b"\0" * 4]), "not a list"),
    "object dtype": (packed([[1], "object", b"\0" * 8]), "has dtype 'object'"),
    "record dtype": (packed([[1], "V8", b"\0" * 8]), "has dtype 'V8'"),
    "dtype with a comma": (packed([[1], "f4,f4", b"\0" * 8]), "has dtype 'f4,f4'"),
    "text as numbers": (packed([[2], "float32", "01234567"]), "has 8 bytes for 'b'"),
    "too few numbers": (packed([[3], "float32", b"\0" * 8]), "has 8 bytes for 'b', which do not fit float32 \\[3\\]"),
    "too many numbers": (packed([[1], "float32", b"\0" * 8]), "has 8 bytes for 'b', which do not fit float32 \\[1\\]"),
    "bomb": (packed([[1 << 39], "float32", b""]), "has 0 bytes for 'b'"),
    "a map of four thousand million": (b"\xdf\xff\xff\xff\xff", "cut short"),
    "numbers of four thousand million": (
        b"\x81\xa1a\xc9\xff\xff\xff\xfc\x01\x93\x91\xce\x3f\xff\xff\xfa\xa7float32\xc6\xff\xff\xff\xe8", "cut short",
    ),
    "extension shorter than its array": (
        packed(GOOD).replace(b"\xc7\x15", b"\xc7\x14"), "bytes for 'b'",
    ),
    "deep": (b"\x81\xa1a" * 64 + b"\x80", "nested deeper than 64"),
    "very deep": (b"\x81\xa1a" * 100_000 + b"\x80", "nested deeper than 64"),
    "chunks without a shape": (library.packb({"a": {msgpack._CHUNKED: True, "chunks": {}}}), "chunks of 'a'"),
    "chunks at the top": (
        serialization.msgpack_serialize({msgpack._CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": np.zeros(2)}}),
        "chunks of ''",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_anything_but_maps_of_plain_arrays_is_refused_with_file_and_reason(tmp_path, case):
    data, said = BAD[case]
    path = saved(tmp_path, data)
    with pytest.raises(CheckpointError, match=said) as error:
        msgpack.open_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


def test_the_cases_above_fail_for_their_reason_alone(tmp_path):
    assert msgpack.open_file(saved(tmp_path, packed(GOOD))).specs == {"a.b": Spec("float32", (2,))}
    assert msgpack.open_file(saved(tmp_path, b"\x81\xa1a" * 63 + b"\x80")).specs == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": {"0": 5}}, "do not add up"),
        ({"shape": {"1": 4}}, "not in flax"),
        ({"chunks": {"0": np.zeros(4), "2": np.zeros(0)}}, "not in flax"),
        ({"chunks": {"0": np.zeros(2), "1": np.zeros(2, np.int64)}}, "different dtypes"),
        ({"chunks": {"0": 4}}, "different dtypes"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(tmp_path, change, said):
    node = {msgpack._CHUNKED: True, "shape": {"0": 4}, "chunks": {"0": np.zeros(2), "1": np.zeros(2)}}
    assert msgpack.open_file(saved(tmp_path, serialization.msgpack_serialize({"a": node}))).specs["a"].shape == (4,)
    with pytest.raises(CheckpointError, match=said):
        msgpack.open_file(saved(tmp_path, serialization.msgpack_serialize({"a": {**node, **change}})))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = serialization.to_bytes({"a": {"kernel": draw(2, 3)}, "b": draw(4)})
    for end in range(len(data)):
        with pytest.raises(CheckpointError, match="cut short"):
            msgpack.open_file(saved(tmp_path, data[:end]))


def test_more_names_than_the_limit_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, {"a": {"b": draw(1), "c": draw(1)}})
    monkeypatch.setattr(msgpack, "MAX_TENSORS", 3)
    assert len(msgpack.open_file(path).specs) == 2
    monkeypatch.setattr(msgpack, "MAX_TENSORS", 2)
    with pytest.raises(CheckpointError, match="more than 2 names"):
        msgpack.open_file(path)


def test_two_leaves_that_torch_would_call_the_same_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a/embedding and a/kernel are both a\.weight"):
        msgpack.open_file(saved(tmp_path, {"a": {"embedding": draw(2, 2), "kernel": draw(2, 2)}}))


def test_shards_as_transformers_wrote_them_open_as_one(tmp_path):
    flat = {"h/0/c/kernel": draw(2, 3), "h/1/c/kernel": draw(2, 3), "wte/embedding": draw(5, 2)}
    names = ["flax_model-00001-of-00002.msgpack", "flax_model-00002-of-00002.msgpack"]
    listed = {}
    for file, paths in zip(names, (["h/0/c/kernel"], ["h/1/c/kernel", "wte/embedding"]), strict=True):
        tree = {}
        for path in paths:
            node = tree
            *outer, last = path.split("/")
            for part in outer:
                node = node.setdefault(part, {})
            node[last] = flat[path]
            listed[path] = file
        (tmp_path / file).write_bytes(serialization.to_bytes(tree))
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    found = everything(stored.open_weights(tmp_path))
    assert found.keys() == {"h.0.c.weight", "h.1.c.weight", "wte.weight"}
    assert np.array_equal(found["h.1.c.weight"], flat["h/1/c/kernel"].T)
