import gc
import itertools
import os
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import safetensors, tensor_file
from fm_jax.hub.files.tensor_file import Place, TensorFile
from fm_jax.hub.files.weights import Spec


def saved(tmp_path, **arrays):
    specs = {name: Spec(array.dtype.name, array.shape) for name, array in arrays.items()}
    safetensors.write(tmp_path, specs, arrays.items())
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("sizes", [(1 << 22, 1 << 17), (64, 1 << 17), (1 << 22, 1), (40, 40)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_part_is_what_numpy_cuts_out_whichever_way_it_is_read(tmp_path, monkeypatch, dtype, sizes):
    monkeypatch.setattr(tensor_file, "_BLOCK", sizes[0])
    monkeypatch.setattr(tensor_file, "_PIECE", sizes[1])
    array = np.arange(5 * 4 * 6).reshape(5, 4, 6).astype(dtype)
    file = safetensors.open_file(saved(tmp_path, before=array[0], a=array))
    cuts = [(0, 5), (1, 3), (4, 5), (2, 2)], [(0, 4), (1, 3), (3, 4)], [(0, 6), (2, 5), (0, 1)]
    for combination in itertools.product(*cuts):
        index = tuple(slice(*cut) for cut in combination)
        assert np.array_equal(file.read("a", index), array[index]), index
    assert np.array_equal(file.read("a", (slice(None),) * 3), array)


def test_a_step_is_refused_rather_than_passed_over(tmp_path):
    file = safetensors.open_file(saved(tmp_path, a=np.arange(6.0)))
    with pytest.raises(ValueError, match="has a step"):
        file.read("a", (slice(0, 6, 2),))


def test_numbers_in_several_runs_read_as_one_tensor(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    (tmp_path / "f").write_bytes(b"xx" + numbers[:5].tobytes() + b"--" + numbers[5:6].tobytes() + numbers[6:].tobytes())
    places = {"a": Place(Spec("float32", (4, 3)), ((2, 20), (24, 4), (28, 24)))}
    file = TensorFile.open(tmp_path / "f", lambda where, opened: places)
    array = numbers.reshape(4, 3)
    for index in itertools.product([slice(0, 4), slice(1, 2), slice(2, 4)], [slice(0, 3), slice(1, 3)]):
        assert np.array_equal(file.read("a", index), array[index])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("place", [0, 70_000, -1])
def test_one_number_that_is_not_finite_is_refused_by_name_unless_allowed(tmp_path, dtype, value, place):
    array = np.ones(140_000, dtype)
    array[place] = float(value)
    path = saved(tmp_path, sound=np.ones(3, dtype), ill=array)
    file = safetensors.open_file(path)
    everything = (slice(0, len(array)),)
    with pytest.raises(CheckpointError, match=r"model.safetensors: ill holds an infinity or a NaN"):
        file.read("ill", everything)
    assert file.read("sound", (slice(0, 3),)).sum() == 3
    assert file.read("ill", (slice(1, 100),)).sum() == 99  # the parts that are read are looked at
    found = safetensors.open_file(path, allow_nonfinite=True).read("ill", everything)
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_and_the_smallest_numbers_are_finite(tmp_path, dtype):
    info = ml_dtypes.finfo(dtype)
    array = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, 0, -0.0], dtype)
    file = safetensors.open_file(saved(tmp_path, a=array))
    assert file.read("a", (slice(0, 6),)).tobytes() == array.tobytes()


def test_integers_are_never_taken_for_infinities(tmp_path):
    array = np.array([-1, 0x7F80, 0x7C00], np.int16)
    file = safetensors.open_file(saved(tmp_path, a=array))
    assert np.array_equal(file.read("a", (slice(0, 3),)), array)


def test_a_file_cut_short_while_it_is_open_is_an_error_not_a_crash(tmp_path):
    path = saved(tmp_path, a=np.ones(10_000, np.float32))
    file = safetensors.open_file(path)
    os.truncate(path, 20_000)
    with pytest.raises(CheckpointError, match="became shorter"):
        file.read("a", (slice(0, 10_000),))


def test_a_file_replaced_while_it_is_open_is_still_the_file_that_was_checked(tmp_path):
    path = saved(tmp_path, a=np.ones(4, np.float32))
    file = safetensors.open_file(path)
    path.unlink()
    path.write_bytes(b"something else")
    assert file.read("a", (slice(0, 4),)).sum() == 4


def test_a_column_of_a_large_tensor_takes_the_memory_of_a_block(tmp_path):
    array = np.ones((8192, 2048), np.float32)  # 64 MB
    file = safetensors.open_file(saved(tmp_path, a=array))
    del array
    tracemalloc.start()
    found = file.read("a", (slice(0, 8192), slice(3, 4)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (8192, 1)
    assert peak < 2.5 * tensor_file._BLOCK


def test_a_piece_of_a_row_longer_than_a_block_is_read_alone(tmp_path):
    array = np.arange(3 << 23, dtype=np.uint8).reshape(3, 1 << 23)
    file = safetensors.open_file(saved(tmp_path, a=array))
    tracemalloc.start()
    found = file.read("a", (slice(1, 3), slice(5, 9)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, array[1:3, 5:9])
    assert peak < 100_000


def test_files_are_closed_with_their_tensors_and_when_they_are_refused(tmp_path):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    path = saved(tmp_path, a=np.ones(4))
    bad = tmp_path / "bad"
    bad.write_bytes(b"bad")
    gc.collect()
    before = opened()
    files = [safetensors.open_file(path) for _ in range(5)]
    assert opened() == before + 5
    with warnings.catch_warnings(record=True) as told:  # Python tells of a file that nobody closed
        warnings.simplefilter("always")
        del files
        for _ in range(5):
            with pytest.raises(CheckpointError):
                safetensors.open_file(bad)
        gc.collect()
    assert not told
    assert opened() == before
