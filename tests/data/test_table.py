"""Rows of every form, and the line that names each kind of damage."""

import json
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data import packed, table
from tests.data.kinds import parquet, put


def read(file: Path, *fields: str, optional: tuple[str, ...] = ()) -> list[tuple[int, table.Row]]:
    return list(table.rows(file, fields, optional=optional))


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_a_json_list_is_read_in_pieces_of_any_size(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_CHUNK", chunk)
    rows = [{"text": 'é } ] , " \\'}, {}, {"n": [1, {"m": None}]}]
    for spelt in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "  [ ] ", "[]"):
        file = put(tmp_path / "a.json", b"\xef\xbb\xbf \n" + spelt.encode())
        assert [row for _, row in read(file)] == json.loads(spelt)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1} {"a": 2}]', r"a.json: row 2: not JSON, or truncated: expected ',' or '\]', not '\{'"),
        (b'[{"a": 1}, ', r"a.json: row 2: not JSON, or truncated"),
        (b'[{"a": 1}', r"a.json: row 2: not JSON, or truncated"),
        (b'[{"a": ', r"a.json: row 1: not JSON, or truncated"),
        (b"[,]", r"a.json: row 1: not JSON, or truncated"),
        (b"[1]", r"a.json: row 1: the line has int, not an object"),
        (b'[{"a": 1}] [', r"a.json: there is more after the end of the list"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', r"a.json:2: not UTF-8 text \(byte 18: 0xe9\)"),
        (b'[{"a": "\xc3', r"a.json:1: not UTF-8 text \(byte 8: 0xc3\)"),
        (b"[" * 10_000, r"a.json: row 1: not JSON"),
    ],
)
def test_a_damaged_list_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read(put(tmp_path / "a.json", content))


def test_a_list_with_an_object_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_LINE", 50)
    monkeypatch.setattr(table, "_CHUNK", 20)
    with pytest.raises(DataError, match=r"a.json: row 1: not JSON, or truncated"):
        read(put(tmp_path / "a.json", json.dumps([{"a": "x" * 100}]).encode()))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_the_one_that_gives_the_columns(separator: str, tmp_path: Path) -> None:
    lines = [["a, b", "text", "c;d"], ["1", "one\ntwo", "3"]]
    spelt = "\r\n".join(separator.join(f'"{cell}"' for cell in line) for line in lines)
    file = put(tmp_path / "a.csv", spelt.encode())
    assert read(file, "text") == [(3, dict(zip(*lines, strict=True)))]


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    file = put(tmp_path / "a.tsv", b'text\tlabel\n"An odd one\t1\n\n')
    assert read(file, "text") == [(2, {"text": '"An odd one', "label": "1"})]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", ""),
        ("a.csv", b"body,label\nx,1\n", r"a.csv: no column 'text' \(the file has 'body', 'label'\)"),
        ("a.csv", b"text,text\nx,1\n", r"a.csv: more than one column 'text'"),
        ("a.csv", b"text,label\nx\n", r"a.csv:2: 1 columns, but the first line names 2"),
        ("a.csv", b'text,label\n"x,1\ny,2\n', r"a.csv:3: not CSV: unexpected end of data"),
        ("a.csv", b"te\rxt,label\n", r"a.csv:1: not CSV: new-line character"),
        ("a.csv", b'text,label\n"x"y,1\n', r"a.csv:2: not CSV: "),
        ("a.csv", b"text,label\nok,1\n\xe9,1\n", r"a.csv:3: not UTF-8 text \(byte 16: 0xe9\)"),
        ("a.tsv", "text\tlabel\n".encode("utf-16"), r"a.tsv:1: not UTF-8 text .*; it is UTF-16: save it as UTF-8"),
        ("a.jsonl", b'{"text": 1}\n{"text": "\xe9"}', r"a.jsonl:2 is not JSON: it is not UTF-8 text \(byte 10\)"),
    ],
)
def test_a_damaged_text_table_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    file = put(tmp_path / name, content)
    if not said:
        assert read(file, "text") == []
        return
    with pytest.raises(DataError, match=said) as error:
        read(file, "text")
    assert "\n" not in str(error.value)


def test_parquet_gives_the_wanted_columns_with_their_types(tmp_path: Path) -> None:
    columns = {"text": ["a"] * 100, "n": list(range(100)), "x": [0.5] * 100, "b": [True] * 100}
    file = put(tmp_path / "a.parquet", parquet(columns, row_group_size=30))
    rows = read(file, "n", "text", optional=("b", "none"))
    assert [row for _, row in rows] == [{"n": n, "text": "a", "b": True} for n in range(100)]
    assert [number for number, _ in rows] == list(range(1, 101))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    whole = parquet({"text": [f"text {number}" for number in range(1000)]}, write_page_checksum=True)
    file = tmp_path / "a.parquet"
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for data in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], b"x" * 100, bytes(flipped)):
        file.write_bytes(data)
        with pytest.raises(DataError, match=r"a.parquet: row \d+: damaged, or not Parquet: ") as error:
            read(file, "text")
        assert "\n" not in str(error.value)
    put(file, whole)
    with pytest.raises(DataError, match=r"a.parquet: no column 'body' \(the file has 'text'\)"):
        read(file, "body")
    with pytest.raises(DataError, match=r"a.parquet: no column 'body'"):
        read(file, optional=("body", "messages"))


def test_parquet_that_unpacks_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 1 << 20)
    file = put(tmp_path / "a.parquet", parquet({"text": ["x" * 10_000] * 10_000}))
    assert file.stat().st_size < 300_000
    with pytest.raises(DataError, match=r"a.parquet unpacks to more than \d+ bytes; split it"):
        read(file, "text")


def test_a_field_may_lie_in_a_field() -> None:
    row = {"a": {"b": 1}, "a.c": 2, "d": 3}
    assert (table.value(row, "a.b", "x"), table.value(row, "a.c", "x")) == (1, 2)
    for field in ("a.x", "d.x", "e"):
        assert not table.has(row, field)
        with pytest.raises(DataError, match=rf"x: no field '{field}' \(the line has 'a', 'a.c', 'd'\)"):
            table.value(row, field, "x")
