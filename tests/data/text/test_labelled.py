import json
from pathlib import Path

import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import labelled


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
    _write(tmp_path, "test", ("great", 5))
    with pytest.raises(DataError, match=r"test.jsonl:1: field 'stars' is int, not text"):
        labelled.load(cfg, tmp_path)


def test_without_a_folder_it_is_the_docstring_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(docstrings, "load", lambda split, data_dir: asked.append((split, data_dir)) or split)
    task = labelled.load(labelled.Config(), tmp_path)
    assert task == labelled.Task(docstrings.CLASSES, "train", "validation", "test")  # type: ignore[arg-type]
    assert asked == [(split, tmp_path) for split in ("train", "validation", "test")]
