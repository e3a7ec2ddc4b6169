"""Rows of parallel text: closed, shifted, padded, cut; and the folders that it is read from."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream import loader
from fm_jax.data.text import parallel, tokenizer
from tests.data.kinds import parquet, put

SOURCES = ["The man sees the dog.", "Today we sing.", "The dog sleeps because the man sings a long song."]
TARGETS = ["Der Mann sieht den Hund.", "Heute singen wir.", "Der Hund schläft, weil der Mann ein langes Lied singt."]
TOKENIZER = tokenizer.train(SOURCES * 3 + TARGETS * 3, 300, sentinels=4)
PAD, END = TOKENIZER.pad_id, TOKENIZER.end_id


def rows(*, source_length: int = 64, target_length: int = 64, prefix: str = "") -> list[dict[str, np.ndarray]]:
    lengths = {"source_length": source_length, "target_length": target_length}
    source = parallel.Pairs(parallel.Parallel(SOURCES, TARGETS), TOKENIZER, **lengths, prefix=prefix)
    return [source[index] for index in range(len(source))]


def test_both_sides_close_with_the_end_token_and_round_trip() -> None:
    for row, source, target in zip(rows(), SOURCES, TARGETS, strict=True):
        length, used = int(row["source_length"]), int(row["weights"].sum())
        assert row["source"][length - 1] == END and row["targets"][used - 1] == END
        assert TOKENIZER.decode(row["source"][: length - 1]) == source
        assert TOKENIZER.decode(row["targets"][: used - 1]) == target
        assert (row["source"][length:] == PAD).all() and (row["targets"][used:] == PAD).all()
        assert (row["weights"][:used] == 1).all()


def test_the_decoder_reads_the_targets_shifted_right_from_the_padding() -> None:
    for row in rows():
        used = int(row["weights"].sum())
        assert row["tokens"][0] == PAD != END
        assert row["tokens"][1:used].tolist() == row["targets"][: used - 1].tolist()
        assert (row["tokens"][used:] == PAD).all()


def test_types_and_shapes_are_those_of_a_batch() -> None:
    row = rows(source_length=20, target_length=24)[0]
    kinds = {name: (value.dtype.name, value.shape) for name, value in row.items()}
    assert kinds == {
        "source": ("int32", (20,)),
        "source_length": ("int32", ()),
        "tokens": ("int32", (24,)),
        "targets": ("int32", (24,)),
        "weights": ("float32", (24,)),
    }


def test_a_source_too_long_keeps_its_end_token_and_a_target_does_not() -> None:
    short, whole = rows(source_length=6, target_length=6)[2], rows()[2]
    assert short["source"].tolist() == [*whole["source"][:5], END] and short["source_length"] == 6
    assert short["targets"].tolist() == whole["targets"][:6].tolist() and END not in short["targets"]
    assert short["tokens"].tolist() == whole["tokens"][:6].tolist() and short["weights"].sum() == 6
    source = parallel.Pairs(parallel.Parallel(SOURCES, TARGETS), TOKENIZER, source_length=24, target_length=64)
    assert 0 < source.cut_share() < 1


def test_the_prefix_stands_before_every_source_and_changes_the_fingerprint() -> None:
    row = rows(prefix="translate English to German: ")[1]
    assert TOKENIZER.decode(row["source"][: row["source_length"] - 1]) == "translate English to German: Today we sing."
    lengths = {"source_length": 9, "target_length": 9}
    marks = {
        parallel.Pairs(parallel.Parallel(SOURCES, targets), TOKENIZER, **lengths, prefix=prefix).fingerprint
        for prefix in ("", "a: ")
        for targets in (TARGETS, TARGETS[::-1])
    }
    assert len(marks) == 4


def test_a_loader_takes_the_rows() -> None:
    source = parallel.Pairs(parallel.Parallel(SOURCES, TARGETS), TOKENIZER, source_length=64, target_length=64)
    (last,) = loader.Epoch(source, 4)
    assert last["source"].shape == (4, 64) and last["weights"][3].sum() == 0 < last["weights"][2].sum()
    batch = next(loader.Batches(source, 2, seed=1, threads=0).iterate(0))
    assert batch["tokens"].shape == (2, 64)


def test_json_lines_and_aligned_files_give_the_same_pairs(tmp_path: Path) -> None:
    lines = [json.dumps({"en": source, "de": target}) for source, target in zip(SOURCES, TARGETS, strict=True)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    aligned = tmp_path / "aligned"
    aligned.mkdir()
    (aligned / "train.en").write_text("\n".join(SOURCES), "utf-8")
    (aligned / "train.de").write_bytes("\r\n".join(TARGETS).encode("utf-8-sig"))
    for found in (parallel.load(tmp_path, "train", fields=("en", "de")), parallel.load(aligned, "train")):
        assert [found.sources[i] for i in range(len(found))] == SOURCES
        assert [found.targets[i] for i in range(len(found))] == TARGETS
        assert found.head(2).targets == TARGETS[:2] and found.name.endswith("/train")
        assert found.fingerprint


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_aligned_files_may_be_packed_and_named_otherwise(packing: str, tmp_path: Path) -> None:
    put(tmp_path / f"dev.en{packing}", "\n".join(SOURCES).encode())
    put(tmp_path / "dev.de", "\n".join(TARGETS).encode())
    found = parallel.load(tmp_path, "validation")
    sources = pickle.loads(pickle.dumps(found)).sources  # noqa: S301  (pickled in the same expression)
    assert [sources[i] for i in (2, 0, 1)] == [SOURCES[i] for i in (2, 0, 1)] and list(found.targets) == TARGETS
    put(tmp_path / "valid.en", b"x")
    with pytest.raises(DataError, match=r"has valid.en and dev.en.*, each of which may be the validation split"):
        parallel.load(tmp_path, "validation")


def test_a_field_of_a_field_is_named_with_a_dot(tmp_path: Path) -> None:
    rows = [{"en": source, "de": target} for source, target in zip(SOURCES, TARGETS, strict=True)]
    put(tmp_path / "train.parquet", parquet({"translation": rows}))
    put(tmp_path / "test.jsonl", "\n".join(json.dumps({"translation": row}) for row in rows).encode())
    for split in ("train", "test"):
        found = parallel.load(tmp_path, split, fields=("translation.en", "translation.de"))
        assert list(found.sources) == SOURCES and list(found.targets) == TARGETS


def test_what_cannot_be_read_is_refused_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_text("One.\nTwo.\n")
    with pytest.raises(DataError, match=r"has train.en, but no train.de"):
        parallel.load(tmp_path, "train")
    (tmp_path / "train.de").write_text("Eins.\n")
    with pytest.raises(DataError, match=r"train.en has 2 lines and .*train.de has 1"):
        parallel.load(tmp_path, "train")
    (tmp_path / "train.de").write_bytes(b"Eins.\n\xff\n")
    found = parallel.load(tmp_path, "train")
    with pytest.raises(DataError, match=r"train.de:2: not UTF-8 text \(byte \d+: 0xff"):
        found.targets[1]
    with pytest.raises(DataError, match="2 sources and 1 targets"):
        parallel.Parallel(["a", "b"], ["c"])
    with pytest.raises(DataError, match=r"pairs: row 1: the target is empty"):
        lines = parallel.Pairs(parallel.Parallel(["a", "b"], ["c", " "]), TOKENIZER, source_length=8, target_length=8)
        list(loader.Epoch(lines, 2))
    with pytest.raises(ConfigError, match="must be at least 2"):
        parallel.Pairs(parallel.Parallel(["a"], ["b"]), TOKENIZER, source_length=1, target_length=8)
