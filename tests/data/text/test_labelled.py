import json
from pathlib import Path

import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import labelled
from tests.data.kinds import parquet, put


def _write(root: Path, split: str, *rows: tuple[str, object]) -> None:
    lines = [json.dumps({"review": text, "stars": label}) + "\n" for text, label in rows]
    (root / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture
def cfg(tmp_path: Path) -> labelled.Config:
    _write(tmp_path, "train", ("fine", "good"), ("bad", "poor"), ("nice", "good"), ("worse", "poor"))
    _write(tmp_path, "validation", ("awful", "poor"))
    _write(tmp_path, "test", ("great", "good"))
    return labelled.Config(path=tmp_path, text="review", label="stars")


def test_a_folder_gives_its_classes_in_sorted_order(cfg: labelled.Config, tmp_path: Path) -> None:
    task = labelled.load(cfg, tmp_path)
    assert task.classes == ("good", "poor")
    assert task.train.texts == ("fine", "bad", "nice", "worse") and task.train.labels.tolist() == [0, 1, 0, 1]
    assert (task.validation.labels.tolist(), task.test.labels.tolist()) == ([1], [0])
    assert docstrings.few(task.train, 1, seed=0).counts() == {"good": 1, "poor": 1}


def test_pairs_have_a_second_field(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{split} {i}", "other": f"and {i}", "label": "xy"[i]} for i in range(2)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = labelled.load(labelled.Config(path=tmp_path, second="other"), tmp_path)
    assert task.train.second == ("and 0", "and 1") and task.test.take([1]).second == ("and 1",)
    assert labelled.load(labelled.Config(path=tmp_path), tmp_path).train.take([1]).second == ()
    with pytest.raises(DataError, match="no field 'nothing'"):
        labelled.load(labelled.Config(path=tmp_path, second="nothing"), tmp_path)
    with pytest.raises(ConfigError, match=r"data.second other needs data.path"):
        labelled.load(labelled.Config(second="other"), tmp_path)


def test_a_label_that_training_lacks_is_named(cfg: labelled.Config, tmp_path: Path) -> None:
    _write(tmp_path, "test", ("great", "good"), ("so so", "medium"))
    with pytest.raises(DataError, match="test has the label 'medium', which no training text has"):
        labelled.load(cfg, tmp_path)


def test_a_label_that_is_no_text_is_named_with_its_line(cfg: labelled.Config, tmp_path: Path) -> None:
    _write(tmp_path, "test", ("great", [5]))
    with pytest.raises(DataError, match=r"test.jsonl:1: field 'stars' is list; a label is text, a whole number or"):
        labelled.load(cfg, tmp_path)


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        ((10, 9, -1), ("-1", "9", "10")),
        ((2.0, 0, 1.0), ("0", "1", "2")),
        ((True, False, True), ("false", "true")),
        (("10", "9", "b"), ("10", "9", "b")),
    ],
)
def test_labels_are_numbers_booleans_or_text_in_their_own_order(
    given: tuple[object, ...], classes: tuple[str, ...], tmp_path: Path
) -> None:
    for split in ("train", "dev", "test"):
        _write(tmp_path, split, *((f"text {number}", label) for number, label in enumerate(given)))
    task = labelled.load(labelled.Config(path=tmp_path, text="review", label="stars"), tmp_path)
    assert task.classes == classes
    spelt = [str(label).lower().removesuffix(".0") for label in given]
    assert [classes[label] for label in task.validation.labels] == spelt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            (1, "1"),
            r"jsonl:2: the label '1' is text, but 1 at .*train.jsonl:1 is a number; write all .* as one kind",
        ),
        ((True, 1), r"train.jsonl:2: the label 1 is a number, but True at .*train.jsonl:1 is true or false"),
        ((1, 0.5), r"train.jsonl:2: the label 0.5 is a fraction; regression is not supported here"),
        ((1, float("nan")), r"train.jsonl:2 is not JSON: NaN is not a number"),
        ((1, None), r"train.jsonl:2: field 'stars' is empty; every text needs a label"),
        (("a", " "), r"train.jsonl:2: field 'stars' is empty; every text needs a label"),
    ],
)
def test_labels_of_two_kinds_or_of_none_are_refused(given: tuple[object, ...], said: str, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        _write(tmp_path, split, *((f"text {number}", label) for number, label in enumerate(given)))
    with pytest.raises(DataError, match=said):
        labelled.load(labelled.Config(path=tmp_path, text="review", label="stars"), tmp_path)


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (("10", "9", "0"), ("0", "9", "10")),
        (("1.0", "0.0", "1.0"), ("0", "1")),
        (("007", "1", "2"), ("007", "1", "2")),
        (("True", "False", "False"), ("False", "True")),
    ],
)
def test_a_column_of_numbers_in_csv_is_one_of_numbers(
    given: tuple[str, ...], classes: tuple[str, ...], tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        lines = [f"text {number};{label}\n" for number, label in enumerate(given)]
        put(tmp_path / f"{split}.csv", "".join(["text;label\n", *lines]).encode())
    assert labelled.load(labelled.Config(path=tmp_path), tmp_path).classes == classes


def test_columns_have_labels_with_their_types(tmp_path: Path) -> None:
    for split in ("train", "eval", "test"):
        put(tmp_path / f"{split}.parquet", parquet({"text": ["a", "b"], "label": [11, 2], "other": [None, None]}))
    task = labelled.load(labelled.Config(path=tmp_path), tmp_path)
    assert task.classes == ("2", "11") and task.train.labels.tolist() == [1, 0]
    put(tmp_path / "train.csv", b"text,label\na,1\n")
    with pytest.raises(DataError, match=r"train.csv and .*train.parquet have the same split in two forms; keep one"):
        labelled.load(labelled.Config(path=tmp_path), tmp_path)


def test_without_a_folder_it_is_the_docstring_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(docstrings, "load", lambda split, data_dir: asked.append((split, data_dir)) or split)
    task = labelled.load(labelled.Config(), tmp_path)
    assert task == labelled.Task(docstrings.CLASSES, "train", "validation", "test")  # type: ignore[arg-type]
    assert asked == [(split, tmp_path) for split in ("train", "validation", "test")]
