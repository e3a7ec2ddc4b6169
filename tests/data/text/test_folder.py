import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import table
from fm_jax.data.text import documents, folder
from fm_jax.data.text.documents import Config
from tests.data.kinds import parquet, put

SPLITS = ("train", "validation", "test")


def _lines(path: Path, count: int = 200) -> Path:
    path.write_text("".join(json.dumps({"text": f"document {i} é", "n": i}) + "\n\n" for i in range(count)), "utf-8")
    return path


def _texts(cfg: Config, split: str, data_dir: Path) -> list[str]:
    found = documents.documents(cfg, split, data_dir)
    return [found[i] for i in range(len(found))]


def test_one_jsonl_file_is_divided_by_line_into_three_disjoint_splits(tmp_path: Path) -> None:
    cfg = Config(kind="jsonl", path=_lines(tmp_path / "data.jsonl"))
    found = {split: _texts(cfg, split, tmp_path) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(f"document {i} é" for i in range(200))
    assert len(found["train"]) > 160 and found["validation"] and found["test"]


def test_files_named_after_splits_are_those_splits(tmp_path: Path) -> None:
    _lines(tmp_path / "train-00000.jsonl", 3)
    _lines(tmp_path / "train-00001.jsonl", 2)
    (tmp_path / "valid").mkdir()
    _lines(tmp_path / "valid" / "a.jsonl", 1)
    cfg = Config(kind="jsonl", path=tmp_path, splits=("train", "valid", "test"))
    assert [len(_texts(cfg, split, tmp_path)) for split in ("train", "validation")] == [5, 1]
    with pytest.raises(DataError, match="no folder or file named after the split 'test'"):
        documents.documents(cfg, "test", tmp_path)


def test_a_text_document_is_a_file(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / split / "deep").mkdir(parents=True)
        (tmp_path / split / "deep" / "b.md").write_text(f"{split} two", "utf-8")
        (tmp_path / split / "a.txt").write_bytes(b"\xef\xbb\xbf" + f"{split} é".encode())
        (tmp_path / split / "ignored.bin").write_bytes(b"\xff")
    cfg = Config(kind="text", path=tmp_path)
    assert _texts(cfg, "validation", tmp_path) == ["validation é", "validation two"]


def test_undivided_text_files_are_divided_by_name(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"trainees_{i}.txt").write_text(f"text {i}")
    found = [_texts(Config(kind="text", path=tmp_path), split, tmp_path) for split in SPLITS]
    assert sorted(text for texts in found for text in texts) == sorted(f"text {i}" for i in range(60))


def test_too_few_files_to_divide_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("all there is")
    cfg = Config(kind="text", path=tmp_path)
    with pytest.raises(DataError, match=r"none of the 2 files of .* fall into split .* sort them into folders"):
        for split in SPLITS:
            documents.documents(cfg, split, tmp_path)


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("inside", [True, False], ids=["a folder", "a file"])
def test_one_text_file_is_cut_by_position_at_ends_of_lines(
    packing: str, inside: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "".join(f"line {number} é\n" for number in range(1000))
    put(tmp_path / f"input.txt{packing}", text.encode())
    cfg = Config(kind="text", path=tmp_path if inside else tmp_path / f"input.txt{packing}")
    parts = [_texts(cfg, split, tmp_path) for split in SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1] and "".join(part[0] for part in parts) == text
    assert all(part[0].endswith("\n") for part in parts)
    assert [round(len(part[0].encode()) / len(text.encode()), 2) for part in parts] == [0.9, 0.05, 0.05]
    assert "is one text: from 90 % to 95 % of it is the split validation" in caplog.text


def test_a_text_without_ends_of_lines_is_cut_at_a_space_or_between_characters(tmp_path: Path) -> None:
    for text in ("word " * 400, "é" * 1000, "x" * 999):
        (tmp_path / "input.txt").write_text(text, "utf-8")
        parts = [_texts(Config(kind="text", path=tmp_path), split, tmp_path)[0] for split in SPLITS]
        assert "".join(parts) == text and all(part.endswith(text[-1]) for part in parts)


def test_a_text_too_short_to_be_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("all there is\n")
    with pytest.raises(DataError, match=r"input.txt is too short to cut a validation split from it; add"):
        documents.documents(Config(kind="text", path=tmp_path / "input.txt"), "validation", tmp_path)


def test_a_large_file_is_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_LARGE", 100)
    text = "".join(f"line {number}\n" for number in range(100))
    put(tmp_path / "train.txt.gz", text.encode())
    put(tmp_path / "validation.txt", text.encode())
    for split in SPLITS[:2]:
        parts = _texts(Config(kind="text", path=tmp_path), split, tmp_path)
        assert "".join(parts) == text and len(parts) > 5 and all(90 < len(part) < 120 for part in parts[:-1])


def test_empty_files_among_many_are_left_out_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "train" / "a.txt", b"")
    put(tmp_path / "train" / "b.txt.gz", b"\xef\xbb\xbf \n")
    for name in "cd":
        put(tmp_path / "train" / f"{name}.txt", name.encode())
    assert _texts(Config(kind="text", path=tmp_path), "train", tmp_path) == ["c", "d"]
    assert "2 of 4 files are empty and left out, first a.txt" in caplog.text
    (tmp_path / "train" / "d.txt").unlink()
    with pytest.raises(DataError, match=r"a.txt is empty; so are 1 more of 3 files; remove them"):
        documents.documents(Config(kind="text", path=tmp_path), "train", tmp_path)


@pytest.mark.parametrize("split", ["valid", "val", "dev", "eval"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_validation_goes_by_many_names(split: str, kind: str, tmp_path: Path) -> None:
    suffix = {"text": "txt", "jsonl": "jsonl"}[kind]
    put(tmp_path / f"train.{suffix}", b'{"text": "a"}')
    put(tmp_path / f"{split}-v2.{suffix}", b'{"text": "b"}')
    cfg = Config(kind=kind, path=tmp_path)  # type: ignore[arg-type]
    assert _texts(cfg, "validation", tmp_path) == [{"text": '{"text": "b"}', "jsonl": "b"}[kind]]
    put(tmp_path / "validation" / f"x.{suffix}", b"c")
    with pytest.raises(DataError, match=r"has validation and .*, each of which may be the validation split"):
        documents.documents(cfg, "validation", tmp_path)


ROWS = [f"row {number} é" for number in range(3)]


def forms() -> dict[str, bytes]:
    lines = [json.dumps({"text": text, "n": 1}) for text in ROWS]
    return {
        "jsonl": "\n\n".join(lines).encode("utf-8-sig"),
        "ndjson": "\n".join(lines).encode(),
        "json": f"[{', '.join(lines)}]".encode("utf-8-sig"),
        "csv": "".join(f'{text},"a, ""b"""\r\n' for text in ["text", *ROWS]).encode("utf-8-sig"),
        "tsv": "".join(f'1\t{text}\t"\n' for text in ["text", *ROWS]).encode(),
        "parquet": parquet({"n": [1, 2, 3], "text": ROWS}),
    }


PACKED = [(form, packing) for form in forms() for packing in ("", ".gz", ".zst") if not (form == "parquet" and packing)]


@pytest.mark.parametrize(("form", "packing"), PACKED)
def test_every_form_of_rows_gives_the_same_texts(form: str, packing: str, tmp_path: Path) -> None:
    put(tmp_path / f"train.{form}{packing}", forms()[form])
    kind = {"ndjson": "jsonl", "json": "jsonl", "tsv": "csv"}.get(form, form)
    cfg = Config(kind=kind, path=tmp_path)  # type: ignore[arg-type]
    opened = documents.documents(cfg, "train", tmp_path)
    assert [opened[index] for index in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert opened.fingerprint == documents.fingerprint(cfg, "train", tmp_path)
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301  (pickled in the same expression)
    assert [again[index] for index in range(len(again))] == ROWS


def test_a_file_of_another_kind_names_the_kind(tmp_path: Path) -> None:
    put(tmp_path / "corpus.parquet", forms()["parquet"])
    with pytest.raises(DataError, match=r"corpus.parquet is not of kind jsonl; set kind to parquet"):
        documents.documents(Config(kind="jsonl", path=tmp_path / "corpus.parquet"), "train", tmp_path)
    put(tmp_path / "input.txt", b"x")
    with pytest.raises(DataError, match=r"input.txt is not of kind parquet; its name must end in .parquet"):
        documents.documents(Config(kind="parquet", path=tmp_path / "input.txt"), "train", tmp_path)


def test_conversations_are_read_from_messages(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]}
    put(tmp_path / "train.jsonl", json.dumps(row).encode())
    put(tmp_path / "dev.jsonl.gz", json.dumps(row).encode())
    for split in SPLITS[:2]:
        assert _texts(Config(kind="jsonl", path=tmp_path), split, tmp_path) == ["user: Hello.\n\nassistant: Hi!"]
    columns = tmp_path / "columns"
    put(columns / "train.parquet", parquet({"messages": [row["messages"]]}))
    for field in ("text", "messages"):
        cfg = Config(kind="parquet", path=columns, field=field)
        assert _texts(cfg, "train", tmp_path) == ["user: Hello.\n\nassistant: Hi!"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_is_no_file_is_refused_by_name_and_does_not_hang(kind: str, tmp_path: Path) -> None:
    suffix = {"text": "txt", "jsonl": "jsonl"}[kind]
    put(tmp_path / f"train-0.{suffix}", b'{"text": "a"}')
    odd = tmp_path / f"train-1.{suffix}"
    cfg = Config(kind=kind, path=tmp_path)  # type: ignore[arg-type]
    for make, why in (
        (lambda: os.mkfifo(odd), "is a pipe, not a file"),
        (lambda: odd.symlink_to("gone"), "is a link to gone, which does not exist"),
        (lambda: odd.symlink_to("/dev/zero"), "is a device, not a file"),
        (lambda: odd.symlink_to(odd.name), "Too many levels of symbolic links"),
    ):
        make()
        for path in (tmp_path, odd):
            with pytest.raises(DataError, match=rf"train-1.*{why}"):
                documents.documents(replace(cfg, path=path), "train", tmp_path)
        odd.unlink()
    (tmp_path / "train-2").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"train-2 links to a folder that contains it; remove the link"):
        documents.documents(cfg, "train", tmp_path)


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.txt", b"one")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train").symlink_to(tmp_path / "elsewhere")
    assert _texts(Config(kind="text", path=tmp_path / "corpus"), "train", tmp_path) == ["one"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_folder_that_is_missing_or_empty_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        documents.documents(Config(kind=kind, path=tmp_path / "nowhere"), "train", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"has no \*\.\w+ or"):
        documents.documents(Config(kind=kind, path=tmp_path), "train", tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut off', r"train.jsonl:3 is not JSON: "),
        (b"[1, 2]", r"train.jsonl:3: the line has list, not an object"),
        (b'{"body": "x"}', r"train.jsonl:3: no field 'text' \(the line has 'body'\)"),
        (b'{"text": 5}', r"train.jsonl:3: field 'text' is int, not text"),
        (b'{"text": "\xff"}', r"train.jsonl:3 is not JSON: it is not UTF-8 text"),
        (b"[" * 100_000, r"train.jsonl:3 is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    found = documents.documents(Config(kind="jsonl", path=tmp_path), "train", tmp_path)
    assert found[0] == "good"
    with pytest.raises(DataError, match=message):
        found[1]


def test_a_line_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_LINE", 50)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "x" * 100}) + "\n")
    with pytest.raises(DataError, match=r"train.jsonl:1: the line is longer than 50 bytes"):
        documents.documents(Config(kind="jsonl", path=tmp_path), "train", tmp_path)[0]


def test_an_empty_jsonl_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        documents.documents(Config(kind="jsonl", path=tmp_path), "train", tmp_path)


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(DataError, match=r"train.txt:3: not UTF-8 text \(byte 11: 0xe9\)"):
        documents.documents(Config(kind="text", path=tmp_path), "train", tmp_path)[0]


def test_an_empty_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"train.txt is empty"):
        documents.documents(Config(kind="text", path=tmp_path), "train", tmp_path)[0]


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    cfg = Config(kind="jsonl", path=_lines(tmp_path / "train.jsonl", 3))
    before = documents.fingerprint(cfg, "train", tmp_path)
    assert documents.fingerprint(cfg, "train", tmp_path) == before
    _lines(tmp_path / "train.jsonl", 4)
    assert documents.fingerprint(cfg, "train", tmp_path) != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kind": "tfds"}, "kind tfds needs a name"), ({"kind": "jsonl"}, "kind jsonl needs a path")],
)
def test_a_config_without_what_its_kind_needs_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**fields)  # type: ignore[arg-type]
