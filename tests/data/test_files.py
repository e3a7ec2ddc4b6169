"""Which files form a split, and what is refused before it is opened."""

import errno
import os
import socket
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data import files
from tests.data.kinds import put


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.jsonl", "dev-v1.1.json", "trainees.json"], "validation", {"dev-v1.1.json"}),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "train", None),
        (["train", "val", "test"], "validation", {"val"}),
        (["eval_0.csv", "train.csv"], "validation", {"eval_0.csv"}),
        (["learn", "dev"], "train", {"learn"}),
        (["validators.txt", "tests.txt", "devices.txt"], "validation", set()),
    ],
)
def test_a_split_goes_by_its_names(names: list[str], split: str, found: set[str] | None, tmp_path: Path) -> None:
    own = "learn" if "learn" in names else ""
    wanted = set(names) if found is None else found
    assert (files.of_split(names, split, tmp_path, own=own) or set()) == wanted


def test_a_split_that_is_missing_or_there_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"named after the split 'validation' \(valid, val, dev, eval\); it contains t"):
        files.of_split(["train.txt"], "validation", tmp_path)
    with pytest.raises(DataError, match=r"has valid.txt and dev.txt, each of which may be the validation split; move"):
        files.of_split(["dev.txt", "valid.txt", "train.txt"], "validation", tmp_path)
    assert files.of_split(["dev.txt", "valid.txt"], "validation", tmp_path, own="dev") == {"dev.txt"}


def test_hidden_files_are_left_out_and_links_followed(tmp_path: Path) -> None:
    for name in ("b/c.txt", "a.TXT", ".hidden.txt", ".git/x.txt", "b/._c.txt", "notes.md"):
        put(tmp_path / name, b"12")
    (tmp_path / "d").symlink_to("b")
    assert list(files.walk(tmp_path, (".txt",))) == [
        (str(tmp_path / name), 2) for name in ("a.TXT", "b/c.txt", "d/c.txt")
    ]


def test_only_a_regular_file_passes(tmp_path: Path) -> None:
    assert files.check(put(tmp_path / "a", b"123")).st_size == 3
    (tmp_path / "link").symlink_to("a")
    assert files.check(tmp_path / "link").st_size == 3
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(tmp_path / "socket"))
        for name, why in (
            ("gone", "is a link to nowhere, which does not exist"),
            ("none", "does not exist"),
            ("pipe", "is a pipe, not a file"),
            ("socket", "is a socket, not a file"),
            (".", "is a folder, not a file"),
            ("a/b", "cannot be opened: Not a directory"),
            ("x\0y", "cannot be opened: .*null"),
        ):
            with pytest.raises(DataError, match=why):
                files.check(tmp_path / name)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (errno.ENOSPC, ResourceError, "no space is left on the disk"),
        (errno.EDQUOT, ResourceError, "quota"),
        (errno.EFBIG, ResourceError, "ulimit -f"),
        (errno.EMFILE, ResourceError, "ulimit -n"),
        (errno.EIO, DataError, "Input/output error"),
    ],
)
def test_a_failed_call_says_what_ran_out(code: int, kind: type[Exception], said: str) -> None:
    error = files.failed(OSError(code, os.strerror(code), "x"), "cannot write x")
    assert type(error) is kind and str(error).startswith("cannot write x: ") and said in str(error)
    spelt = files.failed(RuntimeError(f"write() failed: {os.strerror(code)}; at byte 7\nand more"), "cannot write x")
    assert type(spelt) is kind and said in str(spelt) and "\n" not in str(spelt)
