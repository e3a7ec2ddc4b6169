"""Task files for lm-evaluation-harness: written for local data, so that nothing is downloaded.

A file of questions, NAME.jsonl, has a JSON object a line: "question" (a text), "choices" (texts), "answer" (the number
of the right one, from 0) and, where there is one, "passage". `questions` makes a multiple-choice task of it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.errors import DataError

Row = Mapping[str, Any]
Form = Literal["text", "letter"]
"""What is scored as an answer: the text of each choice, or its letter in a list that the question shows."""

SHOTS = 5  # examples before each question, unless asked otherwise
EXAMPLES = 32  # questions kept apart, from which the examples are drawn
_MOST = 26  # choices that have a letter

_PASSAGE = "{% if passage %}{{passage}}\n{% endif %}Question: {{question}}\n"
_LISTED = "{% for choice in choices %}{{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[loop.index0]}}. {{choice}}\n{% endfor %}"
_FORMS: dict[Form, dict[str, Any]] = {
    "text": {
        "doc_to_text": _PASSAGE + "Answer:",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letter": {
        "doc_to_text": _PASSAGE + _LISTED + "Answer:",
        "doc_to_choice": "letters",
        "metric_list": [{"metric": "acc"}],
    },
}


def write(folder: Path, name: str, rows: Sequence[Row], form: Row, examples: Sequence[Row] = ()) -> None:
    """Write the documents of a task and its task file, as JSON (which is valid YAML).

    Args:
        folder: folder of task files (`include_path` of the harness).
        name: the task's name.
        rows: documents to be scored.
        form: further entries of the task file.
        examples: documents that may come before them as examples; none of them is scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, documents in {"test": rows, "train": examples}.items():
        if documents:
            files[split] = str(folder / f"{name}.{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in documents), "utf-8")
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
    }
    if examples:
        task |= {"training_split": "train", "fewshot_split": "train", "num_fewshot": SHOTS}
    (folder / f"{name}.yaml").write_text(json.dumps(task | dict(form), indent=1), "utf-8")


def questions(source: Path, folder: Path, names: Sequence[str], form: Form = "text") -> None:
    """Write a multiple-choice task for each file NAME.jsonl of questions.

    The questions are shuffled once, the same in every run, so that a limited number of them has all subjects; the first
    `EXAMPLES` (at most a quarter) are kept apart as examples.

    Raises:
        DataError: a missing file, or a line that is no such question; the message names file and line.
    """
    for name in names:
        file = source / f"{name}.jsonl"
        if not file.is_file():
            has = ", ".join(sorted(path.stem for path in source.glob("*.jsonl"))[:12]) or "no .jsonl files"
            raise DataError(f"{file} does not exist; {source} has {has}")
        rows = list(_read(file))
        order = np.random.default_rng(0).permutation(len(rows))
        kept = min(EXAMPLES, len(rows) // 4)
        documents = [rows[index] for index in order]
        task = {"output_type": "multiple_choice", "doc_to_target": "answer", **_FORMS[form]}
        write(folder, name, documents[kept:], task, examples=documents[:kept])


def _read(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _question(line, f"{file}, line {number}")


def _question(line: str, where: str) -> dict[str, Any]:
    row = json_file.parse(line, where, DataError)
    question, choices, answer = (row.get(key) if isinstance(row, dict) else None for key in _KEYS)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where} has no text in the field 'question'")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{where}: the field 'choices' is not a list of texts")
    if not 2 <= len(choices) <= _MOST:
        raise DataError(f"{where} has {len(choices)} choices, not 2 to {_MOST}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: the answer {str(answer)[:40]} is not the number of a choice, 0 to {len(choices) - 1}"
        )
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    passage = row.get("passage") or ""
    return {"passage": passage, "question": question, "choices": choices, "letters": letters, "answer": answer}


_KEYS = ("question", "choices", "answer")
