import json
import os
import struct
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library

from fm_jax.core.errors import CheckpointError, ResourceError
from fm_jax.hub.files import safetensors
from fm_jax.hub.files.weights import Spec

F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def raw(tmp_path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def written(folder, arrays, **more):
    specs = {name: Spec(array.dtype.name, array.shape) for name, array in arrays.items()}
    safetensors.write(folder, specs, arrays.items(), **more)


@pytest.mark.parametrize("dtype", sorted(safetensors.DTYPES.values()))
def test_every_dtype_comes_back_with_its_bits_and_the_library_reads_the_same(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 7))
    array = bits.astype(dtype)
    written(tmp_path, {"a": array, "b.c-d:e/f": array[0]})
    file = safetensors.open_file(tmp_path / "model.safetensors")
    assert file.specs == {"a": Spec(dtype, (3, 5, 7)), "b.c-d:e/f": Spec(dtype, (5, 7))}
    found = file.read("a", whole((3, 5, 7)))
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    theirs = library.load_file(tmp_path / "model.safetensors")
    assert theirs["a"].tobytes() == array.tobytes()
    assert theirs["a"].dtype == array.dtype


def test_a_file_of_the_library_reads_equal(tmp_path):
    arrays = {
        "x": np.arange(12, dtype=np.float32).reshape(3, 4),
        "y": np.arange(5, dtype=ml_dtypes.bfloat16),
        "nothing": np.zeros((0, 3), np.float16),
        "one": np.array(3.5),
    }
    library.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = safetensors.open_file(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        found = file.read(name, whole(array.shape))
        assert found.shape == array.shape
        assert np.array_equal(found, array)


def test_an_array_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "transposed": base.T,
        "columns": base[:, 1::2],
        "backwards": base[::-1, ::-1],
        "fortran": np.asfortranarray(base),
        "repeated": np.broadcast_to(np.float32(7), (3, 2)),
        "scalar": np.array(2.0, np.float32),
        "empty": base[:0].T,
    }
    written(tmp_path, arrays)
    theirs = library.load_file(tmp_path / "model.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(theirs[name], array), name


def test_metadata_and_alignment_are_what_torch_expects(tmp_path):
    arrays = {"flag": np.ones(3, bool), "half": np.ones(3, np.float16), "double": np.ones(3)}
    written(tmp_path, arrays)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % arrays[name].itemsize == 0, name


@pytest.mark.parametrize("size", range(1, 9))
def test_the_numbers_begin_at_a_multiple_of_eight_bytes(tmp_path, size):
    written(tmp_path, {"n" * size: np.ones(2)})
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_everything_is_on_the_disk_when_write_returns(tmp_path, monkeypatch):
    synced = {}
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}), fsync(fd)))
    written(tmp_path, {f"layers.{n}": np.full(10, n) for n in range(3)}, shard_bytes=80)
    assert len(list(tmp_path.iterdir())) == 4
    for path in (tmp_path, *tmp_path.iterdir()):
        assert synced[path.stat().st_ino] == path.stat().st_size, path


def test_shards_and_index_are_named_as_transformers_names_them(tmp_path):
    arrays = {f"layers.{n}": np.full((10, 10), n, np.float32) for n in range(5)}  # 400 bytes each
    written(tmp_path, arrays, shard_bytes=800)
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"] == {f"layers.{n}": names[n // 2] for n in range(5)}
    for name, file in index["weight_map"].items():
        assert np.array_equal(library.load_file(tmp_path / file)[name], arrays[name])


def test_a_tensor_larger_than_a_shard_stands_alone_and_one_file_has_no_index(tmp_path):
    arrays = {"a": np.zeros(4, np.float32), "big": np.zeros(100, np.float32), "b": np.zeros(4, np.float32)}
    written(tmp_path, arrays, shard_bytes=100)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    (tmp_path / "other").mkdir()
    written(tmp_path / "other", arrays)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["model.safetensors"]


def test_tensors_are_taken_one_at_a_time_and_in_any_order(tmp_path):
    specs = {name: Spec("float32", (4,)) for name in "abc"}
    alive = []

    def tensors():
        for name in "cab":
            array = np.full(4, ord(name), np.float32)
            alive.append(os.stat(tmp_path / "model.safetensors").st_size)
            yield name, array

    safetensors.write(tmp_path, specs, tensors())
    assert len(set(alive)) == 1  # the file has its size before the first
    file = safetensors.open_file(tmp_path / "model.safetensors")
    assert [file.read(name, whole((4,)))[0] for name in "abc"] == [97, 98, 99]


@pytest.mark.parametrize("shards", [False, True])
def test_an_interrupted_write_leaves_nothing(tmp_path, shards):
    specs = {name: Spec("float32", (4,)) for name in "ab"}

    def tensors():
        yield "a", np.zeros(4, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        safetensors.write(tmp_path, specs, tensors(), shard_bytes=16 if shards else 1000)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_already_is_neither_written_nor_removed(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        written(tmp_path, {"a": np.zeros(2)})
    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "1 tensors were not given: a"),
        ([("a", np.zeros(2, np.float32))] * 2, "a was given twice"),
        ([("b", np.zeros(2, np.float32))], "b is not in the specs"),
        ([("a", np.zeros(2))], "float64"),
        ([("a", np.zeros(3, np.float32))], "the specs have"),
    ],
)
def test_tensors_that_are_not_as_announced_are_refused(tmp_path, tensors, said):
    with pytest.raises(ValueError, match=said):
        safetensors.write(tmp_path, {"a": Spec("float32", (2,))}, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "dtype"), [("a", "complex64"), ("a", "float8_e4m3fn"), ("../a", "float32")])
def test_what_could_not_be_read_again_is_not_written(tmp_path, name, dtype):
    with pytest.raises(ValueError, match="not be read again"):
        safetensors.write(tmp_path, {name: Spec(dtype, (2,))}, [])
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ResourceError, match="no space for 4e\\+09 GB"):
        safetensors.write(tmp_path, {"a": Spec("float32", (10**9, 10**9))}, [])
    assert not list(tmp_path.iterdir())


def many(count):
    return {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}


BAD = {
    "empty header": (b"", b"", "not a safetensors file"),
    "not json": (b"{" * 20, b"", "has an invalid header"),
    "not utf-8": (b'{"\xff": 1}', b"", "has an invalid header"),
    "deep": (b"[" * 100_000, b"", "has an invalid header"),
    "a list": ([1, 2], b"", "not a JSON object"),
    "huge number": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 9999 + b"]}}", b"", "has an invalid header"),
    "duplicate name": (
        b'{"a":%s,"a":%s}' % ((json.dumps(F).encode(),) * 2), b"\0" * 8, "'a' occurs twice",
    ),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8, "twice"),
    "no metadata": ({"__metadata__": {"format": 1}, "a": F}, b"\0" * 8, "metadata"),
    "climbing name": ({"../../x": F}, b"\0" * 8, "has an invalid name"),
    "nul name": ({"x\0": F}, b"\0" * 8, "has an invalid name"),
    "spaced name": ({"a b": F}, b"\0" * 8, "has an invalid name"),
    "empty name": ({"": F}, b"\0" * 8, "has an invalid name"),
    "long name": ({"a" * 513: F}, b"\0" * 8, "has an invalid name"),
    "line end name": ({"a\n": F}, b"\0" * 8, "has an invalid name"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "not described by"),
    "more fields": ({"a": {**F, "more": 1}}, b"\0" * 8, "not described by"),
    "unknown dtype": ({"a": {**F, "dtype": "F32X"}}, b"\0" * 8, "has dtype 'F32X'; supported are F64"),
    "list as dtype": ({"a": {**F, "dtype": ["F32"]}}, b"\0" * 8, "has dtype"),
    "negative shape": ({"a": {**F, "shape": [-2]}}, b"\0" * 8, "the invalid shape"),
    "true as shape": ({"a": {**F, "shape": [2, True]}}, b"\0" * 8, "the invalid shape"),
    "float shape": ({"a": {**F, "shape": [2.0]}}, b"\0" * 8, "the invalid shape"),
    "overflowing shape": ({"a": {**F, "shape": [2**33, 2**33]}}, b"\0" * 8, "the invalid shape"),
    "overflow hidden by a zero": ({"a": {**F, "shape": [2**62, 0], "data_offsets": [0, 0]}}, b"", "the invalid shape"),
    "33 axes": ({"a": {**F, "shape": [1] * 33, "data_offsets": [0, 4]}}, b"\0" * 4, "the invalid shape"),
    "backward offsets": ({"a": {**F, "data_offsets": [8, 0]}}, b"\0" * 8, "the invalid offsets"),
    "three offsets": ({"a": {**F, "data_offsets": [0, 8, 8]}}, b"\0" * 8, "the invalid offsets"),
    "negative offset": ({"a": {**F, "data_offsets": [-8, 0]}}, b"\0" * 8, "the invalid offsets"),
    "wrong size": ({"a": {**F, "shape": [3]}}, b"\0" * 8, "needs 12 bytes for F32 \\[3\\] but has 8"),
    "outside": ({"a": {**F, "data_offsets": [8, 16]}}, b"\0" * 8, "begins at byte 8"),
    "hole": ({"a": F, "b": {**F, "data_offsets": [12, 20]}}, b"\0" * 20, "b begins at byte 12"),
    "overlap": ({"a": F, "b": {**F, "data_offsets": [4, 12]}}, b"\0" * 12, "b begins at byte 4"),
    "same place": ({"a": F, "b": F}, b"\0" * 8, "begins at byte 0"),
    "truncated": ({"a": F}, b"\0" * 7, "describes 8 bytes of data, the file has 7"),
    "trailing": ({"a": F}, b"\0" * 9, "describes 8 bytes of data, the file has 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_is_not_sound_is_refused_with_its_file_and_reason(tmp_path, case):
    header, data, said = BAD[case]
    path = raw(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=said) as error:
        safetensors.open_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_the_cases_above_fail_for_their_reason_alone(tmp_path):
    safetensors.open_file(raw(tmp_path, {"a": F, "b": {**F, "data_offsets": [8, 16]}}, b"\0" * 16))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 500])
def test_a_length_that_the_file_has_not_got_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        safetensors.open_file(raw(tmp_path, {"a": F}, length=length))


def test_limits_hold_at_one_more_and_not_at_the_limit(tmp_path, monkeypatch):
    path = raw(tmp_path, many(5), b"")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 5)
    monkeypatch.setattr(safetensors, "MAX_HEADER", length)
    assert len(safetensors.open_file(path).specs) == 5
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 4)
    with pytest.raises(CheckpointError, match="5 tensors; at most 4"):
        safetensors.open_file(path)
    monkeypatch.setattr(safetensors, "MAX_HEADER", length - 1)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        safetensors.open_file(path)


def test_a_name_given_a_hundred_thousand_times_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="occurs twice"):
        safetensors.open_file(raw(tmp_path, b"{" + b",".join(b'"k%d":0' % (n % 99_999) for n in range(100_000)) + b"}"))


@pytest.mark.parametrize("make", ["missing", "folder", "pipe", "empty"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, make):
    path = tmp_path / "model.safetensors"
    if make == "folder":
        path.mkdir()
    if make == "pipe":
        os.mkfifo(path)
    if make == "empty":
        path.touch()
    done = []

    def attempt():
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            safetensors.open_file(path)
        done.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert done


@pytest.mark.parametrize("bit", range(0, 8 * 120, 7))
def test_a_flipped_bit_in_the_header_is_refused_or_changes_a_name_or_nothing_but_that(tmp_path, bit):
    path = raw(tmp_path, {"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, b"\0" * 24)
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        file = safetensors.open_file(path, allow_nonfinite=True)
    except CheckpointError:
        return
    (spec,) = file.specs.values()
    assert spec.dtype in ("float32", "int32", "uint32")  # as many bytes
    assert file.read(*file.specs, whole(spec.shape)).nbytes == 24
