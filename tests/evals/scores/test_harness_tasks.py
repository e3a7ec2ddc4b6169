"""Task files of questions: what is asked, what is kept apart, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.scores import harness_tasks

ROW = {"question": "What sat?", "choices": ["a cat", "a mat"], "answer": 0}


def made(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quiz.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return folder


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("count", [1, 10, 300])
def test_examples_are_kept_apart_and_every_question_is_there_once(count: int, tmp_path: Path) -> None:
    rows = [ROW | {"question": f"What is {n}?", "passage": "P" if n % 2 else ""} for n in range(count)]
    harness_tasks.questions(made(tmp_path / "in", rows), tmp_path / "out", ["quiz"])
    task = json.loads((tmp_path / "out" / "quiz.yaml").read_text())
    files = task["dataset_kwargs"]["data_files"]
    parts = {split: lines(file) for split, file in files.items()}
    asked = [row["question"] for part in parts.values() for row in part]
    assert sorted(asked) == sorted(row["question"] for row in rows)
    kept = {1: 0, 10: 2, 300: harness_tasks.EXAMPLES}[count]
    assert len(parts.get("train", [])) == kept and ("fewshot_split" in task) == bool(kept)
    assert count < 300 or [row["question"] for row in parts["test"]] != sorted(asked)[kept:]  # shuffled
    harness_tasks.questions(tmp_path / "in", tmp_path / "again", ["quiz"])
    assert lines(str(tmp_path / "again" / "quiz.test.jsonl")) == parts["test"]  # in the same way each time


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 has no text in the field 'question'"),
        (ROW | {"question": " "}, "line 2 has no text in the field 'question'"),
        (ROW | {"choices": "ab"}, "line 2: the field 'choices' is not a list of texts"),
        (ROW | {"choices": ["a", ""]}, "'choices' is not a list of texts"),
        (ROW | {"choices": ["a"]}, "line 2 has 1 choices, not 2 to 26"),
        (ROW | {"answer": 2}, "the answer 2 is not the number of a choice, 0 to 1"),
        (ROW | {"answer": True}, "the answer True is not"),
        (ROW | {"answer": "a cat"}, "the answer a cat is not"),
    ],
)
def test_a_line_that_is_no_question_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        harness_tasks.questions(made(tmp_path, [ROW, row]), tmp_path / "out", ["quiz"])
    assert "quiz.jsonl" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"quizz\.jsonl does not exist; .* has quiz"):
        harness_tasks.questions(made(tmp_path, [ROW]), tmp_path / "out", ["quizz"])
