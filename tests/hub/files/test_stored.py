import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from flax import serialization

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import safetensors, stored
from fm_jax.hub.files.weights import Spec

ARRAYS = {f"layers.{n}": np.full((10, 10), n, np.float32) for n in range(5)}
FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
INDEX = "model.safetensors.index.json"


def write(folder, arrays=ARRAYS, shard_bytes=800):
    folder.mkdir(exist_ok=True, parents=True)
    specs = {name: Spec(array.dtype.name, array.shape) for name, array in arrays.items()}
    safetensors.write(folder, specs, arrays.items(), shard_bytes=shard_bytes)
    return folder


def reindex(folder, change):
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def check(weights):
    assert weights.specs == {name: Spec("float32", (10, 10)) for name in ARRAYS}
    for name, array in ARRAYS.items():
        assert np.array_equal(weights.read(name, (slice(2, 4), slice(0, 10))), array[2:4])


def refused(folder, said):
    with pytest.raises(CheckpointError, match=said) as error:
        stored.open_weights(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_one_file_and_shards_hold_the_same(tmp_path):
    check(stored.open_weights(write(tmp_path / "one", shard_bytes=10**6)))
    check(stored.open_weights(str(write(tmp_path / "many"))))
    assert not (tmp_path / "many" / "model.safetensors").exists()


def test_the_links_of_a_download_cache_are_followed(tmp_path):
    blobs = tmp_path / "blobs"
    write(blobs)
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
        file.rename(blobs / f"{number:040x}")
    check(stored.open_weights(snapshot))


def test_a_link_to_nothing_is_told(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../gone")
    refused(tmp_path, r"model\.safetensors is a link to \.\./gone, which does not exist")
    folder = write(tmp_path / "many")
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)
    refused(folder, f"{SECOND} is a pipe, not a file")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "a\\b.safetensors",
        "..",
        ".",
        "",
        ".hidden",
        "a\0b",
        "x" * 256,
        7,
        None,
        ["a"],
    ],
)
def test_an_index_cannot_name_a_file_elsewhere_even_one_that_exists(tmp_path, name):
    folder = write(tmp_path / "model")
    write(tmp_path / "model" / "sub", shard_bytes=10**6)
    (tmp_path / "secret.safetensors").write_bytes((folder / "sub" / "model.safetensors").read_bytes())
    reindex(folder, lambda listed: listed.update({"layers.0": name}))
    refused(folder, "which is not a file beside it")


def test_a_missing_shard_is_told_before_any_is_opened(tmp_path):
    folder = write(tmp_path)
    (folder / SECOND).unlink()
    (folder / FIRST).write_bytes(b"damaged")
    refused(folder, f"{SECOND} missing; fetch the folder again")


def test_a_shard_that_the_index_does_not_name_is_told(tmp_path):
    folder = write(tmp_path)
    other = "model-00004-of-00004.safetensors"
    (folder / other).write_bytes((folder / FIRST).read_bytes())
    refused(folder, f"it does not name {other}")


def test_all_differences_between_index_and_shards_come_in_one_message(tmp_path):
    folder = write(tmp_path)
    write(tmp_path / "again", {"layers.0": ARRAYS["layers.0"], "more": ARRAYS["layers.1"]}, 10**6)
    (tmp_path / "again" / "model.safetensors").replace(folder / THIRD)
    with pytest.raises(CheckpointError) as error:
        stored.open_weights(folder)
    for said in (
        f"layers.0 is in {FIRST} and in {THIRD}",
        f"more is in {THIRD} but not in the index",
        f"layers.4 is not in {THIRD}",
    ):
        assert said in str(error.value)


def test_a_tensor_listed_in_another_shard_than_its_own_is_told(tmp_path):
    folder = write(tmp_path)
    reindex(folder, lambda listed: listed.update({"layers.0": SECOND}))
    refused(folder, f"layers.0 is not in {SECOND}")


def test_a_damaged_shard_is_named(tmp_path):
    folder = write(tmp_path)
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:-1])
    refused(folder, SECOND)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' occurs twice"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_an_index_that_is_none_is_told(tmp_path, text, said):
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, said)


def test_an_index_above_the_limit_is_not_read(tmp_path, monkeypatch):
    folder = write(tmp_path)
    monkeypatch.setattr(stored, "MAX_INDEX", (folder / INDEX).stat().st_size)
    check(stored.open_weights(folder))
    monkeypatch.setattr(stored, "MAX_INDEX", stored.MAX_INDEX - 1)
    refused(folder, "larger than")


def test_two_sets_of_weights_in_one_folder_are_told_apart_by_the_user(tmp_path):
    folder = write(tmp_path)
    write(tmp_path, shard_bytes=10**6)
    refused(folder, f"holds model.safetensors and {INDEX}; remove the one that should not be read")
    (folder / INDEX).unlink()
    refused(folder, f"holds model.safetensors and {FIRST}")
    (folder / "model.safetensors").unlink()
    refused(folder, f"holds {FIRST} but no {INDEX}")


def test_shards_may_have_any_name_and_an_index_may_name_the_single_file(tmp_path):
    folder = write(tmp_path / "odd")
    names = {FIRST: "model-00001-of-000003.safetensors", SECOND: "rest.safetensors", THIRD: "model_3.safetensors"}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    reindex(folder, lambda listed: listed.update({name: names[file] for name, file in listed.items()}))
    check(stored.open_weights(folder))
    one = write(tmp_path / "one", shard_bytes=10**6)
    (one / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(ARRAYS, "model.safetensors")}))
    check(stored.open_weights(one))
    reindex(one, lambda listed: listed.pop("layers.0"))
    refused(one, r"layers\.0 is in model\.safetensors but not in the index")


def test_safetensors_are_preferred_to_flax_and_flax_to_nothing(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes({"dense": {"kernel": np.ones((2, 3))}}))
    assert stored.open_weights(tmp_path).specs == {"dense.weight": Spec("float64", (3, 2))}
    check(stored.open_weights(write(tmp_path)))


def torch_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))


class Bomb:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth", "b.ckpt", "c.pkl", "odd_name"])
def test_a_folder_of_pickles_says_that_nothing_was_opened_and_what_to_do(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(pickle.dumps([Bomb()]))
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, rf"only as pickles \({name}\): a pickle can run code, so nothing was opened.*save_pretrained")
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", FIRST])
def test_a_pickle_under_another_name_is_told_by_its_content(tmp_path, capsys, protocol, name):
    if name == FIRST:
        write(tmp_path)
    if protocol == "zip":
        torch_zip(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"weights": [1.0] * 50, "b": Bomb()}, protocol=protocol))
    refused(tmp_path, f"{name} is a pickle despite its name")
    assert "it ran" not in capsys.readouterr().out


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    for length in (0x0280, 0x010280, 0x0580):
        text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        text += b" " * (length - len(text))
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + b"\0" * 4)
        assert list(stored.open_weights(tmp_path).specs) == ["a"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs\noid sha256:0\nsize 1\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_other_things_that_downloads_leave_are_named(tmp_path, content, said, name):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, f"{name} is {said}, not the weights")


def test_a_folder_without_weights_lists_what_there_is(tmp_path):
    refused(tmp_path, "it has no files")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF")
    refused(tmp_path, "no model.safetensors; it has config.json, tf_model.h5")
    for number in range(20):
        (tmp_path / f"x{number}").touch()
    refused(tmp_path, "and 12 more")
    refused(tmp_path / "config.json", "is not a folder")
    refused(tmp_path / "gone", "is not a folder")


def test_numbers_that_are_not_finite_are_allowed_only_where_asked(tmp_path):
    write(tmp_path, {"a": np.array([np.inf]), "b": np.zeros(200)}, 100)
    with pytest.raises(CheckpointError, match="a holds an infinity"):
        stored.open_weights(tmp_path).read("a", (slice(0, 1),))
    assert stored.open_weights(tmp_path, allow_nonfinite=True).read("a", (slice(0, 1),)) == np.inf
