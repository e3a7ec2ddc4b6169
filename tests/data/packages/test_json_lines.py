"""Whatever is written comes back, one object a line in every sense of a line."""

import json

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import json_lines


def test_every_text_comes_back_and_stays_on_its_line(tmp_path):
    rows = [{"text": f"a{chr(code)}b"} for code in (0, 10, 11, 12, 13, 28, 0x85, 0x2028, 0x2029, 0xE4, 0x1F436)]
    assert json_lines.write(tmp_path / "a.jsonl", rows) == len(rows)
    text = (tmp_path / "a.jsonl").read_text("utf-8")
    assert json_lines.read(tmp_path / "a.jsonl") == rows == [json.loads(line) for line in text.splitlines()]
    assert "ä" in text and "🐶" in text


def test_nothing_is_a_file_of_no_lines(tmp_path):
    assert json_lines.write(tmp_path / "a.jsonl", []) == 0
    assert json_lines.read(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"5", b"\xff", b"[" * 99_999], ids=["cut", "list", "number", "not UTF-8", "deep"]
)
def test_a_line_that_is_no_object_is_named(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        json_lines.read(tmp_path / "a.jsonl")
