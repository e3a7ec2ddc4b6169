import os
import struct
import threading
import time
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import gguf, stored
from fm_jax.hub.files.gguf_blocks import KINDS, OTHERS
from fm_jax.hub.files.weights import Spec
from tests.hub.gguf_files import ARRAY, BLOCKS, STRING, Packed, Typed, info, joined, pair, random_blocks, text
from tests.hub.gguf_files import gguf as made

X = np.arange(64, dtype=np.float32).reshape(2, 32)


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def put(tmp_path, data, name="model.gguf"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def opened(tmp_path, data, **more):
    return gguf.open_file(put(tmp_path, data), **more)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_numbers_come_back_with_their_bits(tmp_path, version, dtype):
    array = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(dtype)
    file = opened(tmp_path, made({}, {"a": array, "blk.0.b-c": array[0, 0]}, version=version))
    assert file.specs == {"a": Spec(array.dtype.name, (3, 5, 7)), "blk.0.b-c": Spec(array.dtype.name, (7,))}
    assert file.read("a", whole((3, 5, 7))).tobytes() == array.tobytes()
    assert file.read("a", (slice(1, 3), slice(0, 5), slice(2, 4))).tobytes() == array[1:3, :, 2:4].tobytes()


def test_every_value_of_the_metadata_is_read(tmp_path):
    sent = {
        0: 255, 1: -128, 2: 65535, 3: -32768, 4: 2**32 - 1, 5: -(2**31), 6: 0.1, 7: True, 10: 2**64 - 1,
        11: -(2**63), 12: 0.1,
    }  # fmt: skip
    metadata: dict[str, Any] = {f"n.{kind}": Typed(kind, number) for kind, number in sent.items()}
    metadata |= {"t": "naïve\n", "empty": "", "texts": ["a", ""], "none": Typed(ARRAY, [], 4), "ids": [1, 2, 3]}
    metadata |= {"deep": Typed(ARRAY, [Typed(ARRAY, [1, 2], 4), Typed(ARRAY, [], 4)], ARRAY), "eps": 1e-5}
    found = opened(tmp_path, made(metadata, {"x": X})).metadata
    for kind, number in sent.items():
        assert found[f"n.{kind}"] == number and type(found[f"n.{kind}"]) is type(number)
    assert found["eps"] == 1e-5  # not 9.999999747378752e-06
    assert (found["t"], found["empty"], found["texts"]) == ("naïve\n", "", ["a", ""])
    assert found["none"].tolist() == [] and found["ids"].tolist() == [1, 2, 3]
    assert [part.tolist() for part in found["deep"]] == [[1, 2], []]


def test_tensors_out_of_order_and_a_wider_alignment_are_read(tmp_path):
    arrays = {"a": X[:1, :3], "b": X + 1, "c": X[0] + 2}
    for alignment in (1, 32, 64, 4096):
        file = opened(tmp_path, made({}, arrays, alignment=alignment, order=["c", "a", "b"]))
        assert list(file.specs) == ["a", "b", "c"]
        for name, array in arrays.items():
            assert np.array_equal(file.read(name, whole(array.shape)), array)


def test_the_padding_after_the_last_tensor_may_be_absent(tmp_path):
    data = made({}, {"a": X[0, :3]})
    assert opened(tmp_path, data[:-20]).read("a", whole((3,))).tolist() == [0, 1, 2]


# -- blocks ------------------------------------------------------------------------------------------------------------

HALF, QUARTER, MINUS_TWO = (np.float16(x).tobytes() for x in (0.5, 0.25, -2))
COUNTED = bytes((15 - i) << 4 | i for i in range(16))  # 0 … 15 in the low nibbles, 15 … 0 in the high ones
UP_AND_DOWN = np.array([*range(16), *range(15, -1, -1)])
ODD = b"\xaa" * 4  # the fifth bit of every second number
FIVE = UP_AND_DOWN + 16 * (np.arange(32) % 2)

BY_HAND = {
    2: (HALF + COUNTED, 0.5 * (UP_AND_DOWN - 8)),
    3: (HALF + MINUS_TWO + COUNTED, 0.5 * UP_AND_DOWN - 2),
    6: (HALF + ODD + COUNTED, 0.5 * (FIVE - 16)),
    7: (QUARTER + MINUS_TWO + ODD + COUNTED, 0.25 * FIVE - 2),
    8: (QUARTER + np.arange(-16, 16, dtype=np.int8).tobytes(), 0.25 * np.arange(-16, 16)),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_blocks_of_32_decode_to_what_a_hand_computes(tmp_path, kind):
    data, wanted = BY_HAND[kind]
    file = opened(tmp_path, made({}, {"x": Packed(kind, (2, 32), data + data)}))
    found = file.read("x", whole((2, 32)))
    assert found.dtype == np.float32 and found.tolist() == [wanted.tolist()] * 2


SCALES, MINIMA = [1, 2, 33, 62, 5, 21, 38, 63], [0, 7, 50, 63, 3, 17, 44, 60]


def six_bits():
    """Pack eight scales and eight minima of six bits into twelve bytes."""
    packed = [SCALES[i] | SCALES[i + 4] >> 4 << 6 for i in range(4)]
    packed += [MINIMA[i] | MINIMA[i + 4] >> 4 << 6 for i in range(4)]
    return bytes(packed + [SCALES[i + 4] & 15 | (MINIMA[i + 4] & 15) << 4 for i in range(4)])


def test_blocks_of_256_decode_to_what_a_loop_computes(tmp_path):
    rng = np.random.default_rng(1)
    low, four = rng.integers(0, 256, 128, np.uint8), rng.integers(0, 256, 32, np.uint8)
    two, signed = rng.integers(0, 256, 64, np.uint8), rng.integers(-128, 128, 16, np.int8)
    q4, q5, q6 = np.zeros(256), np.zeros(256), np.zeros(256)
    for i in range(256):
        group, inside = i // 32, i % 32
        q = low[32 * (group // 2) + inside] >> 4 * (group % 2) & 15
        q4[i] = 0.5 * SCALES[group] * q + 2.0 * MINIMA[group]
        q5[i] = 0.5 * SCALES[group] * (q + 16 * (four[inside] >> group & 1)) + 2.0 * MINIMA[group]
        half, place = i // 128, i % 128
        q = low[64 * half + place % 64] >> 4 * (place // 64) & 15
        q += 16 * (two[32 * half + place % 32] >> 2 * (place // 32) & 3)
        q6[i] = 0.25 * signed[i // 16] * (int(q) - 32)
    tensors = {
        "q4": Packed(12, (1, 256), HALF + MINUS_TWO + six_bits() + low.tobytes()),
        "q5": Packed(13, (1, 256), HALF + MINUS_TWO + six_bits() + four.tobytes() + low.tobytes()),
        "q6": Packed(14, (1, 256), low.tobytes() + two.tobytes() + signed.tobytes() + QUARTER),
    }
    file = opened(tmp_path, made({}, tensors))
    for name, wanted in (("q4", q4), ("q5", q5), ("q6", q6)):
        assert file.read(name, whole((1, 256))).tolist() == [wanted.tolist()]


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_part_of_packed_rows_is_what_numpy_cuts_out(tmp_path, kind):
    width = 3 * BLOCKS[kind][0]
    file = opened(tmp_path, made({}, {"x": random_blocks(kind, (2, 4, width))}))
    full = file.read("x", whole((2, 4, width)))
    size = BLOCKS[kind][0]
    for columns in (slice(0, width), slice(size, 2 * size), slice(5, size + 1), slice(width - 1, width), slice(0, 0)):
        for rows in (slice(0, 4), slice(1, 3), slice(2, 2)):
            index = (slice(1, 2), rows, columns)
            assert np.array_equal(file.read("x", index), full[index])
            out = np.full((5, *full[index].shape), np.nan, np.float32)
            assert file.read("x", index, out[2]) is not None
            assert np.array_equal(out[2], full[index]) and np.isnan(out[[0, 1, 3, 4]]).all()


def test_only_the_rows_that_are_asked_for_are_decoded(tmp_path):
    file = opened(tmp_path, made({}, {"x": random_blocks(12, (4096, 1024))}))
    tracemalloc.start()
    file.read("x", (slice(100, 108), slice(0, 1024)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18  # the whole tensor has 1 << 24 bytes


def test_a_scale_that_is_not_finite_is_refused_unless_it_is_allowed(tmp_path):
    data = np.float16(np.inf).tobytes() + COUNTED
    content = made({}, {"x": Packed(2, (2, 32), HALF + COUNTED + data)})
    file = opened(tmp_path, content)
    assert file.read("x", (slice(0, 1), slice(0, 32))).tolist() == [BY_HAND[2][1].tolist()]
    with pytest.raises(CheckpointError, match="x holds an infinity or a NaN"):
        file.read("x", whole((2, 32)))
    assert not np.isfinite(opened(tmp_path, content, allow_nonfinite=True).read("x", whole((2, 32)))).all()


# -- what is refused ---------------------------------------------------------------------------------------------------

GOOD = made({"k": 1}, {"a": X, "b": X})
ENTRY = info("a", 0, (2, 32), 0)
DATA = X.tobytes()


def one(entry, data=DATA):
    return joined([], [entry], data)


def keys(*pairs):
    return joined(list(pairs), [ENTRY], DATA)


def counted(tensors, pairs):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"\0" * 100


BAD = {
    "empty": (b"", "not a GGUF file"),
    "magic": (b"GGML" + GOOD[4:], "not a GGUF file"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + GOOD[8:], "is big-endian; convert it"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], "is GGUF version 1; supported are 2 and 3"),
    "version 4": (b"GGUF" + struct.pack("<I", 4) + GOOD[8:], "is GGUF version 4"),
    "tensor count": (counted(2**64 - 1, 0), "18446744073709551615 tensors; at most 100000"),
    "key count": (counted(0, 2**63), "9223372036854775808 keys; at most 10000"),
    "more keys than there are": (counted(0, 9_999), "the invalid key ''"),
    "key length": (keys(struct.pack("<Q", 2**63)), "a key of 9223372036854775808 bytes; at most 1024"),
    "text length": (keys(text("k") + struct.pack("<IQ", STRING, 2**40)), "1099511627776 bytes; at most"),
    "text past the end": (keys(text("k") + struct.pack("<IQ", STRING, 10_000)), "is cut short"),
    "array count": (keys(text("k") + struct.pack("<IIQ", ARRAY, 4, 2**62)), "an array of 4611686018427387904 items"),
    "array past the end": (keys(text("k") + struct.pack("<IIQ", ARRAY, 12, 10**6)), "is cut short"),
    "arrays without end": (keys(text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 50), "nested"),
    "unknown value": (keys(text("k") + struct.pack("<I", 13)), "the unknown type 13 in 'k'"),
    "unknown item": (keys(text("k") + struct.pack("<IIQ", ARRAY, 99, 1)), "the unknown type 99 in 'k'"),
    "truth": (keys(text("k") + struct.pack("<IB", 7, 2)), "neither 0 nor 1"),
    "key twice": (keys(pair("k", 1), pair("k", 1)), "the key 'k' twice"),
    "empty key": (keys(pair("", 1)), "the invalid key ''"),
    "key of controls": (keys(pair("a\nb", 1)), r"the invalid key 'a\\nb'"),
    "key not UTF-8": (keys(pair(b"\xff", 1)), "a key that is not UTF-8"),
    "text not UTF-8": (keys(pair("k", b"\xff")), "a text in 'k' that is not UTF-8"),
    "alignment 24": (keys(pair("general.alignment", 24)), "general.alignment '24', which is not a power of two"),
    "alignment 0": (keys(pair("general.alignment", 0)), "general.alignment '0'"),
    "alignment a text": (keys(pair("general.alignment", "32\x1b")), "general.alignment '32\\\\x1b'"),
    "alignment beyond the file": (keys(pair("general.alignment", 1 << 31)), "describes 256 bytes of data and has 0"),
    "block version": (joined([pair("general.quantization_version", 1)], [info("x", 2, (1, 32), 0)], b"\0" * 32),
                      "blocks of version 1; only version 2"),
    "block version of many": (
        joined([pair("general.quantization_version", [2, 2])], [info("x", 2, (1, 32), 0)], b"\0" * 32), "of version"
    ),
    "name twice": (joined([], [ENTRY, ENTRY], DATA + DATA), "the tensor a twice"),
    "climbing name": (one(info("../../x", 0, (2, 32), 0)), "a tensor with the invalid name"),
    "nul name": (one(info("x\0", 0, (2, 32), 0)), "a tensor with the invalid name"),
    "long name": (one(info("x" * 513, 0, (2, 32), 0)), "a tensor name of 513 bytes"),
    "name not UTF-8": (one(info(b"\xfe", 0, (2, 32), 0)), "a tensor name that is not UTF-8"),
    "five axes": (one(info("a", 0, (1, 1, 1, 2, 32), 0)), "5 axes; at most 4"),
    "4 billion axes": (one(text("a") + struct.pack("<I", 2**32 - 1)), "4294967295 axes"),
    "an axis of nothing": (one(info("a", 0, (0, 32), 0)), r"the invalid shape \[0, 32\]"),
    "overflowing shape": (one(info("a", 0, (2**40, 2**40), 0)), "the invalid shape"),
    "removed type": (one(info("a", 4, (2, 32), 0)), r"block type 4 \(Q4_2, removed\), which is not supported: only"),
    "type not read": (one(info("a", 10, (1, 256), 0)), r"block type 10 \(Q2_K\)"),
    "unknown type": (one(info("a", 77, (2, 32), 0)), r"block type 77 \(unknown\)"),
    "rows of half a block": (one(info("a", 2, (2, 48), 0)), "rows of 48 numbers, not a multiple of the 32 in a block"),
    "a scalar of blocks": (one(info("a", 2, (), 0)), "rows of 0 numbers"),
    "wide rows of 32": (one(info("a", 12, (8, 32), 0)), "not a multiple of the 256 in a block of Q4_K"),
    "odd offset": (one(info("a", 0, (2, 32), 8)), "a at byte 8 of the data, not a multiple of 32"),
    "offset beyond the file": (one(info("a", 0, (2, 32), 2**40)), "a at byte 1099511627776"),
    "offset that wraps": (one(info("a", 0, (2, 32), 2**64 - 32)), "a at byte 18446744073709551584"),
    "overlap": (joined([], [ENTRY, info("b", 0, (2, 32), 128)], DATA + DATA), "b at byte 128 .* before ends at 256"),
    "the same place": (joined([], [ENTRY, info("b", 0, (2, 32), 0)], DATA + DATA), "b at byte 0"),
    "hole": (joined([], [ENTRY, info("b", 0, (2, 32), 512)], DATA * 3), "b at byte 512 .* before ends at 256"),
    "larger than the file": (one(info("a", 0, (2, 64), 0)), "describes 512 bytes of data and has 256"),
    "trailing": (one(ENTRY, DATA + b"\0" * 32), "describes 256 bytes of data and has 288"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_sound_is_refused_with_its_name_and_reason(tmp_path, case):
    data, said = BAD[case]
    path = put(tmp_path, data)
    with pytest.raises(CheckpointError, match=said) as error:
        gguf.open_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_the_cases_above_fail_for_their_reason_alone(tmp_path):
    for data in (GOOD, one(ENTRY), keys(pair("k", 1), pair("l", 1)), keys(pair("general.alignment", 32))):
        opened(tmp_path, data)


def test_every_type_is_either_read_or_has_a_name_to_be_refused_by():
    assert not KINDS.keys() & OTHERS.keys()
    assert KINDS.keys() | OTHERS.keys() == set(range(42))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = made({"a": [1, 2], "b": "text", "c": ["x", "y"]}, {"x": X[:, :3], "y": random_blocks(2, (1, 32))})
    end = len(data) - 14  # the last tensor's padding
    opened(tmp_path, data[:end])
    for length in range(end):
        with pytest.raises(CheckpointError, match=r"cut short|describes|not a GGUF file"):
            opened(tmp_path, data[:length])


def test_a_flipped_bit_before_the_data_is_refused_or_gives_a_file_that_can_be_read(tmp_path):
    data = made({"k.e": [1, 2], "t": "text"}, {"x": X[:, :4], "y": random_blocks(8, (1, 32))})
    refused = 0
    for bit in range(0, 8 * (len(data) - 128), 5):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            file = opened(tmp_path, bytes(changed), allow_nonfinite=True)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        for name, spec in file.specs.items():
            assert file.read(name, whole(spec.shape)).nbytes <= 1024
    assert refused > 100


def test_limits_hold_at_one_more_and_not_at_the_limit(tmp_path, monkeypatch):
    metadata = {"a": [1, 2, 3], "b": ["x", "y"]}
    path = put(tmp_path, made(metadata, {"x": X}))
    for name, size, said in (
        ("MAX_ITEMS", 5, "items in 'b'"),
        ("MAX_KEYS", 2, "2 keys"),
        ("MAX_TENSORS", 1, "1 tensors"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf, name, size)
            gguf.open_file(path)
            patch.setattr(gguf, name, size - 1)
            with pytest.raises(CheckpointError, match=said):
                gguf.open_file(path)
    monkeypatch.setattr(gguf, "MAX_METADATA", 100)
    with pytest.raises(CheckpointError, match="more than 100 bytes before its tensors"):
        gguf.open_file(path)


def test_absurd_counts_take_neither_memory_nor_time(tmp_path):
    started = time.perf_counter()
    tracemalloc.start()
    for case in ("tensor count", "text length", "array count", "array past the end", "arrays without end"):
        with pytest.raises(CheckpointError):
            opened(tmp_path, BAD[case][0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and time.perf_counter() - started < 5


@pytest.mark.parametrize("make", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, make):
    path = tmp_path / "model.gguf"
    if make == "folder":
        path.mkdir()
    if make == "pipe":
        os.mkfifo(path)
    done = []

    def attempt():
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            gguf.open_file(path)
        assert not gguf.is_gguf(path)
        done.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert done


# -- in a folder -------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_known_by_its_first_bytes_or_its_name(tmp_path):
    assert gguf.is_gguf(put(tmp_path, GOOD, "sha256-0123"))
    assert gguf.is_gguf(put(tmp_path, b"<html>", "page.GGUF"))
    assert not gguf.is_gguf(put(tmp_path, b"<html>", "page"))


def test_the_only_gguf_file_of_a_folder_is_its_weights(tmp_path):
    path = put(tmp_path, GOOD)
    assert stored.gguf_file(tmp_path) == stored.gguf_file(path) == path
    assert set(stored.open_weights(tmp_path).specs) == set(stored.open_weights(path).specs) == {"a", "b"}
    (tmp_path / "model.safetensors").touch()
    assert stored.gguf_file(tmp_path) is None
    (tmp_path / "model.safetensors").unlink()
    put(tmp_path, GOOD, "other.gguf")
    with pytest.raises(CheckpointError, match=r"holds model\.gguf, other\.gguf; give the path of one of them"):
        stored.open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert stored.gguf_file(tmp_path) is None
    with pytest.raises(CheckpointError, match="give the path of a GGUF file itself"):
        stored.open_weights(tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"<!DOCTYPE html>", "an HTML page"), (b"version https://git-lfs x", "a git-lfs pointer"), (b"", "is empty"),
     (b"PK\x03\x04....", "is a pickle despite its name")],
)  # fmt: skip
def test_what_is_named_as_gguf_and_is_something_else_is_named(tmp_path, data, said):
    put(tmp_path, data)
    with pytest.raises(CheckpointError, match=said):
        stored.open_weights(tmp_path)
