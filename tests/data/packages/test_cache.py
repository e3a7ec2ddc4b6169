"""Where the cache is, that a set appears whole or not at all, and that every change of it is found."""

import errno
import fcntl
import json
import os
import re
import threading
from pathlib import Path

import pytest

from fm_jax.core.errors import CheckpointError, DataError
from fm_jax.data import files
from fm_jax.data.packages import cache
from fm_jax.data.text import parallel
from fm_jax.hub import pretrained
from tests.data.packages import made


@pytest.fixture
def toy(tmp_path):
    """Return (source, sealed folder)."""
    package = made.package("pip", made.wheel(tmp_path / "toy.whl", {"a": b"1"}), "a")
    source, folder = made.source(package), tmp_path / "cache" / "toy"
    folder.parent.mkdir()
    with cache.appearing(folder) as part:
        (part / "deep").mkdir()
        (part / "deep" / "a.txt").write_text("first")
        (part / "b.txt").write_text("second")
        cache.seal(part, "toy", source, {"toy": "1.0"}, {"rows": 2})
    return source, folder


def test_a_set_that_is_missing_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FM_DATA", str(tmp_path))
    brings = "does not exist; ./launch.sh local experiments.fetch --name {} brings it"
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/minilm {brings.format('minilm')}")):
        pretrained.find(cache.place("minilm"))
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/help_en_de {brings.format('help_en_de')}")):
        parallel.load(cache.place("help_en_de"), "train")
    with pytest.raises(DataError, match=r"passages does not exist; .*--name boolq brings it"):
        files.find(cache.place("boolq") / "passages", "train", (".jsonl",))
    for other in (tmp_path / "mine", tmp_path.parent / "minilm"):
        with pytest.raises(DataError, match=r"does not exist$"):
            files.find(other, "train", (".jsonl",))


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for name in ("FM_DATA", "FM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.root() == Path("/home/me/.cache/fm_jax/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/big")
    assert cache.root() == Path("/big/fm_jax/data")
    monkeypatch.setenv("FM_CACHE", "/fast")
    assert cache.root() == Path("/fast/data")
    monkeypatch.setenv("FM_DATA", "/data")
    assert cache.root() == Path("/data")


def test_the_record_says_where_a_set_comes_from(toy):
    source, folder = toy
    record = cache.opened(folder, source)
    assert record["counts"] == {"rows": 2} and record["licence"] == "MIT" and record["attribution"] == "nobody"
    (package,) = record["packages"]
    assert package == {"client": "pip", "name": "toy", "version": "1.0", "sha256": source.packages[0].sha256}
    assert {name: entry["bytes"] for name, entry in record["files"].items()} == {"deep/a.txt": 5, "b.txt": 6}
    assert cache.opened(folder.with_name("absent"), source) is None


CHANGES = {
    "flipped": (lambda folder: (folder / "b.txt").write_text("sccond"), r"b\.txt is damaged \(its sha256 differs"),
    "longer": (lambda folder: (folder / "b.txt").write_text("second!"), r"b\.txt is damaged \(7 bytes instead of 6"),
    "gone": (lambda folder: (folder / "deep/a.txt").unlink(), r"deep/a\.txt is damaged \(missing"),
    "a folder": (lambda folder: ((folder / "b.txt").unlink(), (folder / "b.txt").mkdir()), r"b\.txt is damaged \(Is a"),
    "no record": (lambda folder: (folder / "SOURCE.json").unlink(), "has no SOURCE.json"),
    "cut record": (lambda folder: (folder / "SOURCE.json").write_text('{"files": {'), "SOURCE.json is damaged"),
    "odd record": (lambda folder: (folder / "SOURCE.json").write_text("[1]"), "SOURCE.json is damaged"),
    "deep record": (lambda folder: (folder / "SOURCE.json").write_text("[" * 99999), "SOURCE.json is damaged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_found_and_named(name, toy):
    source, folder = toy
    change, message = CHANGES[name]
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        cache.opened(folder, source)
    assert str(folder) in str(caught.value) and "fetch it again" in str(caught.value)


def test_another_layout_or_package_is_another_set(toy):
    source, folder = toy
    other = made.package("pip", made.wheel(folder.parent / "other.whl", {"a": b"2"}), "a")
    for changed in (made.source(*source.packages, layout=2), made.source(other)):
        with pytest.raises(DataError, match="written by another version"):
            cache.opened(folder, changed)


def test_files_of_the_user_beside_it_do_not_matter(toy):
    source, folder = toy
    (folder / "notes.md").write_text("mine")
    assert cache.opened(folder, source) is not None


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), cache.appearing(tmp_path / "toy") as part:
        (part / "half").write_text("x")
        assert part.parent == tmp_path and part.name.startswith(".")
        raise OSError(28, "full")
    assert not list(tmp_path.iterdir())


def test_the_lock_waits_for_another_and_removes_what_a_killed_run_left(tmp_path, capsys):
    (tmp_path / ".fetch-dead").mkdir()
    (tmp_path / ".fetch-dead" / "half").write_text("x")
    (tmp_path / "mine").mkdir()
    other = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.1, os.close, [other]).start()  # closing lets go of the lock
    with cache.locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mine"]
    assert "waiting for another process" in capsys.readouterr().err


def test_without_locks_it_goes_on_and_removes_nothing(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    (tmp_path / ".fetch-other").mkdir()
    with cache.locked(tmp_path):
        assert (tmp_path / ".fetch-other").exists()
    assert "has no file locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(DataError, match=r"cannot be written \(.*; give another folder with --to, or set FM_DATA"),
        cache.locked(tmp_path / "file" / "cache"),
    ):
        raise AssertionError("it was entered")


def test_a_record_is_readable_json(toy):
    assert json.loads((toy[1] / "SOURCE.json").read_text())["layout"] == 1
