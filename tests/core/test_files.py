import os
import resource
import socket
from pathlib import Path

import pytest

from fm_jax.core import files
from fm_jax.core.errors import CheckpointError, DataError, ResourceError


def test_a_file_is_there_through_links_and_nothing_is_not(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "further").symlink_to(tmp_path / "link")
    assert all(files.there(tmp_path / name, DataError) for name in ("file", "link", "further"))
    assert not files.there(tmp_path / "none", DataError)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "is a folder, not a file"),
        (os.mkfifo, "is a pipe, not a file"),
        (lambda path: path.symlink_to("gone"), "is a link to gone, which does not exist"),
        (lambda path: path.symlink_to("odd"), "cannot be opened: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/null"), "is a device, not a file"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "is a socket, not a file"),
    ],
)
def test_what_is_no_file_is_named(make, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("odd"))
    with pytest.raises(DataError, match=f"^odd {said}"):
        files.there("odd", DataError)


def test_a_name_below_a_file_is_no_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Not a directory"):
        files.there(tmp_path / "file" / "config.json", CheckpointError)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "a/b/c", "empty"):
        files.check_target(tmp_path / name, CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_place_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("gone")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    for target, said in {
        tmp_path / "file": "exists already",
        tmp_path / "link": "exists already",
        full: "exists already",
        tmp_path / "file" / "below" / "more": "is not a folder",
        tmp_path / "link" / "below": "is not a folder",
        Path("/proc/none/model"): "cannot be written: ",
        tmp_path / ("x" * 300): "cannot be written: File name too long",
        Path("/proc"): "exists already",
    }.items():
        with pytest.raises(CheckpointError, match=said) as error:
            files.check_target(target, CheckpointError)
        assert "\n" not in str(error.value) and str(target)[:20] in str(error.value)


def test_a_disk_that_fills_is_a_lack_of_space(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(ResourceError, match=r"model cannot be written: .*free some space"),
            files.writing("model", CheckpointError),
            open(tmp_path / "file", "wb", buffering=0) as out,
        ):
            out.write(bytes(1000))
            out.write(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = "model cannot be written: Not a directory"
    with pytest.raises(CheckpointError, match=said), files.writing("model", CheckpointError):
        (tmp_path / "file" / "x").mkdir()
