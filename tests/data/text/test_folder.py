import json
from pathlib import Path

import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text import documents, folder
from fm_jax.data.text.documents import Config

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
    (tmp_path / "input.txt").write_text("all there is")
    cfg = Config(kind="text", path=tmp_path / "input.txt")
    with pytest.raises(
        DataError, match=r"none of the 1 files of .*input.txt fall into split .* sort them into folders"
    ):
        for split in SPLITS:
            documents.documents(cfg, split, tmp_path)


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
        (b"[1, 2]", r"train.jsonl:3: no field 'text' \(the line has list\)"),
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
    monkeypatch.setattr(folder, "MAX_LINE", 50)
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
