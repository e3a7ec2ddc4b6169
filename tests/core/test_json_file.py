"""JSON from outside: what is read, and that all else is one line that names the file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fm_jax.core import json_file
from fm_jax.core.errors import CheckpointError, DataError


def put(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "a.json").write_bytes(content)
    return tmp_path / "a.json"


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


GOOD: dict[str, tuple[bytes, Any]] = {
    "object": (b'{"a": [1, 2.5, null, true, "b"]}', {"a": [1, 2.5, None, True, "b"]}),
    "mark": (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    "length": (b'{"a": 1000000000000000019884624838656}', {"a": 10**30 + 19884624838656}),
    "pair": (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    "deep": (nested(64), json.loads(nested(64))),
    "same key in two objects": (b'{"a": {"b": 1}, "c": {"b": 2}}', {"a": {"b": 1}, "c": {"b": 2}}),
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON: Expecting value"),
    "cut": (b'{"a": ', "is not JSON: Expecting value"),
    "list": (b"[1]", "holds a list, not a JSON object"),
    "number": (b"3", "holds a int, not a JSON object"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), r"is not JSON: it is not UTF-8 text \(byte 0\)"),
    "latin-1": ('{"a": "ü"}'.encode("latin-1"), "not UTF-8 text"),
    "twice": (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    "twice inside": (b'{"b": [{"a": 1, "a": 1}]}', "the key 'a' occurs twice"),
    "nan": (b'{"a": NaN}', "NaN is not a number in JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not a number"),
    "overflow": (b'{"a": 1e999}', "the number 1e999 is out of range"),
    "digits": (b'{"a": 1' + b"0" * 400 + b"}", "a number has 401 digits, more than 40"),
    "more digits": (b'{"a": 1' + b"0" * 9999 + b"}", "a number has 10000 digits"),
    "surrogate": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "surrogate in a key": (b'{"\\uDC00": 1}', "half of a surrogate pair"),
    "too deep": (nested(65), "more than 64 deep"),
    "deeper than the stack": (b"[" * 100_000, "too deeply"),
    "control": (b'{"a": "\x1b"}', "Invalid control character"),
    "key of controls": (b'{"\\u001b": 1, "\\u001b": 2}', r"the key '\\x1b' occurs twice"),
}


@pytest.mark.parametrize("case", GOOD)
def test_json_is_read(tmp_path: Path, case: str) -> None:
    content, want = GOOD[case]
    assert json_file.read(put(tmp_path, content), DataError) == want


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_json_or_beyond_a_limit_is_one_line(tmp_path: Path, case: str) -> None:
    content, said = BAD[case]
    for kind in (DataError, CheckpointError):
        with pytest.raises(kind, match=said) as caught:
            json_file.read(put(tmp_path, content), kind)
        text = str(caught.value)
        assert text.startswith(str(tmp_path / "a.json")) and text.isprintable() and len(text) < 300


def test_a_file_is_read_to_its_limit_only(tmp_path: Path) -> None:
    file = put(tmp_path, b'{"a": "bcd"}')
    assert json_file.read(file, DataError, most=12) == {"a": "bcd"}
    with pytest.raises(DataError, match="is larger than 11 bytes"):
        json_file.read(file, DataError, most=11)
    with pytest.raises(DataError, match="/dev/zero is a device, not a file"):
        json_file.read(Path("/dev/zero"), DataError)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    (tmp_path / "link").symlink_to("gone")
    for name, said in (("pipe", "is a pipe, not"), ("link", "which does not exist"), ("none", "does not exist")):
        with pytest.raises(DataError, match=said):
            json_file.read(tmp_path / name, DataError)
    with pytest.raises(DataError, match="is a folder, not a file"):
        json_file.read(tmp_path, DataError)
    locked = put(tmp_path, b"{}")
    with pytest.raises(DataError, match="cannot be opened: Not a directory"):
        json_file.read(locked / "a.json", DataError)


def test_a_line_of_data_may_have_half_a_pair() -> None:
    assert json_file.parse(b'{"a": "\\ud800"}', "line 1", DataError, halves=True) == {"a": "\ud800"}
    with pytest.raises(DataError, match=r"^line 1 is not JSON: a text has half"):
        json_file.parse('{"a": "\\ud800"}', "line 1", DataError)
