"""The reader takes what the format describes, and every lie of a file ends in one line."""

import random
import struct

import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import ctranslate2
from fm_jax.hub.files.weights import Spec


def name(text):
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def variable(title, array, *, kind=None, count=None, dims=None):
    kind = ctranslate2.DTYPES.index(array.dtype.name) if kind is None else kind
    dims = array.shape if dims is None else dims
    head = struct.pack(f"<B{len(dims)}IBI", len(dims), *dims, kind, array.nbytes if count is None else count)
    return name(title) + head + array.tobytes()


def model(*variables, aliases=(), spec="ToySpec", version=6, count=None):
    out = struct.pack("<I", version) + name(spec) + struct.pack("<II", 3, len(variables) if count is None else count)
    out += b"".join(variables) + struct.pack("<I", len(aliases))
    return out + b"".join(name(part) for alias in aliases for part in alias)


ARRAYS = {
    "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a/bias": np.array([0.5, -2], np.float32),
    "b": np.array(-3, np.int16),
    "empty": np.zeros((0, 4), np.int32),
    "small": np.array([-1, 1], np.int8),
}
WHOLE = model(*(variable(*pair) for pair in ARRAYS.items()), aliases=[("c/weight", "a/weight")])


def put(folder, data):
    path = folder / "model.bin"
    path.write_bytes(data)
    return path


def test_every_variable_comes_back(tmp_path):
    file = ctranslate2.open_file(put(tmp_path, WHOLE))
    assert (file.spec, file.revision, file.aliases) == ("ToySpec", 3, {"c/weight": "a/weight"})
    assert file.tensors.specs == {key: Spec(array.dtype.name, array.shape) for key, array in ARRAYS.items()}
    for key, array in ARRAYS.items():
        found = file.tensors.read(key, tuple(slice(0, size) for size in array.shape))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


ONE = np.zeros(2, np.float32)
LIES = {
    "version": (model(version=5), r"not a CTranslate2 model of version 6 \(its first number is 5"),
    "type": (model(variable("a", ONE, kind=6)), "a has the unknown type 6"),
    "bytes": (model(variable("a", ONE, count=4)), r"a has 4 bytes, its shape \[2\] of float32"),
    "shape": (model(variable("a", ONE, dims=(2**31, 2**31, 2**31))), "a has 8 bytes, its shape"),
    "rank": (model(variable("a", ONE, dims=(1,) * 9)), "a has 9 dimensions"),
    "after the end": (model(variable("a", ONE, dims=(2**29,), count=2**31)), "a ends after the file"),
    "twice": (model(variable("a", ONE), variable("a", ONE)), "a is there twice"),
    "count": (model(variable("a", ONE), count=2), "cut short|is damaged"),
    "absurd count": (model(count=4_000_000_000), "it says it has 4000000000 variables"),
    "rest": (WHOLE + b"\0", "it ends at byte"),
    "leaves the folder": (model(variable("../a", ONE)), r"name of a variable is '\.\./a'"),
    "control character": (model(variable("a\nb", ONE)), r"name of a variable is 'a\\nb'"),
    "no name": (model(variable("", ONE)), "name of a variable is ''"),
    "alias of nothing": (model(variable("a", ONE), aliases=[("b", "c")]), "the alias b of c"),
    "alias is there": (model(variable("a", ONE), aliases=[("a", "a")]), "the alias a of a"),
    "empty": (b"", "cut short at byte 0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie, tmp_path):
    data, message = LIES[lie]
    with pytest.raises(CheckpointError, match=message):
        ctranslate2.open_file(put(tmp_path, data))


def test_every_cut_is_refused(tmp_path):
    for length in range(0, len(WHOLE), 2):
        with pytest.raises(CheckpointError):
            ctranslate2.open_file(put(tmp_path, WHOLE[:length]))


def test_random_damage_is_refused_or_read_and_nothing_else(tmp_path):
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(WHOLE)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            file = ctranslate2.open_file(put(tmp_path, data))
            for key, spec in file.tensors.specs.items():
                file.tensors.read(key, tuple(slice(0, size) for size in spec.shape))
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError):
            ctranslate2.open_file(path)
