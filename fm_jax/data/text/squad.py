"""Extractive question answering: questions of SQuAD's form, and their rows as overlapping windows of one length.

Rajpurkar et al. 2016 (v1.1, every question has an answer) and 2018 (v2.0, some have none); the windows are those of
Devlin et al. 2019, section 4.2. Positions of answers are characters (code points), as in the files.

A file is nested as the authors' files are (articles, paragraphs, questions), or flat as the datasets library writes it
(JSON lines, a JSON list or Parquet): {"id", "context", "question", "answers": {"text": […], "answer_start": […]}}.
Either may be without answers: then it is there to be answered, not to be scored.

A question may have two fields beyond SQuAD's: "kind", by which scores are grouped, and "same_type", all spans of the
context with the same type as the answer, which the baselines use.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import files, packed, table
from fm_jax.data.text.encoded import Encoded
from fm_jax.data.text.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
_AT_ONCE = 1000  # pairs per call of the tokenizer
_SHARD = re.compile(r"-\d+-of-\d+\b")


@dataclass(frozen=True)
class Span:
    """A span of a context: its text and the character where it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """One question about one context; `answers` is empty if it has none (v2.0), or if its file has none."""

    id: str
    text: str
    context: str
    answers: tuple[Span, ...]
    kind: str = ""
    same_type: tuple[Span, ...] = ()
    labelled: bool = True  # whether the question's file has answers


@dataclass(frozen=True)
class Cut:
    """How question and context are split into windows, in tokens."""

    length: int = 384  # tokens of a row: question, window and special tokens
    stride: int = 128  # tokens from the start of one window to the start of the next
    question: int = 64  # maximum length of a question; longer ones are truncated

    def __post_init__(self) -> None:
        """Refuse sizes that leave no token."""
        for name in ("length", "stride", "question"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


def load(folder: Path) -> dict[str, tuple[Question, ...]]:
    """Read the splits of a folder, whose files are named after them: train*, validation* or dev*, test*.

    Raises:
        DataError: no train file, neither a validation nor a test file, two files for a split that are no shards, no
            answers where they are needed, or as `read` raises.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder with train.json and validation.json")
    suffixes = (*table.SUFFIXES["jsonl"], *table.SUFFIXES["parquet"])
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(suffixes))
    except OSError as error:
        raise files.failed(error, f"cannot read {folder}") from error
    named = {split: _files_of(names, split, folder) for split in SPLITS}
    if not named["train"] or not (named["validation"] or named["test"]):
        there = ", ".join(names[:8]) or "nothing"
        raise DataError(f"{folder} needs a train*.json and a validation*.json, dev*.json or test*.json; it has {there}")
    questions = {split: read(*(folder / name for name in mine)) for split, mine in named.items() if mine}
    for split in ("train", "validation" if "validation" in questions else "test"):
        if not is_labelled(questions[split]):
            need = "training" if split == "train" else "choosing the best step"
            raise DataError(f"{folder / named[split][0]} has no answers, but {need} needs the {split} split's")
    return questions


def read(*parts: Path) -> tuple[Question, ...]:
    """Read a file of v1.1 or v2.0, or its shards; every answer must occur in its context where the file says.

    Raises:
        DataError: unreadable, of another form, a duplicate id, an answer at another position, or a question marked
            impossible that has answers (or not marked and without answers); the message names file and question.
    """
    entries: list[tuple[Path, _Entry]] = []
    for file in parts:
        entries += (mine := [(file, entry) for entry in (_flat(file) if _is_flat(file) else _nested(file))])
        if not mine:
            raise DataError(f"{file} contains no questions")
    labelled = any(entry.question.answers or entry.impossible for _, entry in entries)
    seen: dict[str, Question] = {}
    for file, (question, impossible, empty) in entries:
        if question.id in seen:
            raise DataError(f"{file}: question {question.id!r} occurs twice; ids must be unique")
        if labelled and not (question.answers or impossible or empty):
            where = f"{file}: question {question.id!r}"
            raise DataError(f'{where} has no answer; add one, or mark it "is_impossible": true')
        seen[question.id] = replace(question, labelled=labelled)
    return tuple(seen.values())


def is_labelled(questions: Sequence[Question]) -> bool:
    """Return whether answers to these questions can be scored."""
    return all(question.labelled for question in questions)


class Windows:
    """Rows {"tokens", "types": int32 [T], "length", "start", "end": int32 [], "weights": float32 []}.

    A row is [CLS] question [SEP] window of the context [SEP], as the tokenizer joins pairs, then padding from `length`
    on. `start` and `end` (inclusive) are the tokens of the first answer; both are 0, the [CLS] token, if the window
    does not contain the whole answer.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: Tokenizer, cut: Cut | None = None, *, name: str = "questions"
    ) -> None:
        """Tokenise the questions; rows are built on demand.

        Raises:
            DataError: no questions, a question or context without tokens, an answer that no token covers, or a
                `stride` that would skip tokens between windows; the message names the question.
        """
        if not questions:
            raise DataError(f"{name} contains no questions")
        self.name, self.questions, self._cut, self._pad = name, tuple(questions), cut or Cut(), tokenizer.pad_id
        self._pairs = list(_pairs(tokenizer, self.questions, self._cut, name))
        places = [(q, a, b) for q, pair in enumerate(self._pairs) for a, b in pair.windows(self._cut)]
        self.places: np.ndarray = np.array(places, np.int64)
        """int64 [N, 3], one row per window: index of the question, first and last + 1 of its context tokens."""
        digest = hashlib.sha256(f"{self._cut}{tokenizer.fingerprint}".encode())
        for question in self.questions:
            digest.update(f"{question.id}\0{question.text}\0{question.context}\0{question.answers[:1]}\0".encode())
        self.fingerprint = f"squad-{digest.hexdigest()[:16]}"
        vocab, length = tokenizer.vocab_size, self._cut.length
        self.limits: Mapping[str, int] = {"tokens": vocab, "length": length + 1, "start": length, "end": length}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, first, last = (int(x) for x in self.places[index])
        pair, length = self._pairs[number], self._cut.length
        ids, types = pair.row(first, last)
        start = end = 0
        if pair.answer is not None and first <= pair.answer[0] and pair.answer[1] < last:
            start, end = (token - first + pair.before for token in pair.answer)
        return {
            "tokens": np.pad(ids, (0, length - len(ids)), constant_values=self._pad),
            "types": np.pad(types, (0, length - len(ids))),
            "length": np.asarray(len(ids), np.int32),
            "start": np.asarray(start, np.int32),
            "end": np.asarray(end, np.int32),
            "weights": np.asarray(1.0, np.float32),
        }

    def context(self, index: int) -> tuple[int, np.ndarray]:
        """Return the index of the context's first token in a row, and the character offsets [n, 2] of its n tokens."""
        number, first, last = (int(x) for x in self.places[index])
        return self._pairs[number].before, self._pairs[number].offsets[first:last]


@dataclass(frozen=True)
class _Pair:
    """A question and its whole context in tokens."""

    head: tuple[np.ndarray, np.ndarray]  # ids and types up to the context
    body: tuple[np.ndarray, np.ndarray]  # ids and types of the context
    tail: tuple[np.ndarray, np.ndarray]  # ids and types after the context
    offsets: np.ndarray  # [n, 2] character offsets of the context's tokens
    answer: tuple[int, int] | None  # first and last token of the first answer, within the context

    @property
    def before(self) -> int:
        return len(self.head[0])

    def windows(self, cut: Cut) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of each window's context tokens; the last window ends with the context."""
        room, total, first = cut.length - self.before - len(self.tail[0]), len(self.offsets), 0
        while first + room < total:
            yield first, first + room
            first += cut.stride
        yield first, total

    def row(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        ids, types = (
            np.concatenate([head, body[first:last], tail])
            for head, body, tail in zip(self.head, self.body, self.tail, strict=True)
        )
        return ids, types


def _pairs(tokenizer: Tokenizer, questions: Sequence[Question], cut: Cut, name: str) -> Iterator[_Pair]:
    for first in range(0, len(questions), _AT_ONCE):
        some = questions[first : first + _AT_ONCE]
        pairs = tokenizer.encode_pairs([question.text for question in some], [question.context for question in some])
        for question, encoded in zip(some, pairs, strict=True):
            yield _pair(encoded, question, cut, f"{name}: question {question.id!r}")


def _pair(encoded: Encoded, question: Question, cut: Cut, where: str) -> _Pair:
    (ask, asked), (begin, end) = _bounds(encoded, 0, where), _bounds(encoded, 1, where)
    if not ask:
        raise DataError(
            f"{where}: the tokenizer puts no special token first to predict 'no answer'; use one with [CLS]"
        )
    keep = np.r_[:ask, ask : min(asked, ask + cut.question), asked:begin]
    offsets = encoded.offsets[begin:end]
    room = cut.length - len(keep) - (len(encoded.ids) - end)
    if room < 1 or (cut.stride > room and room < end - begin):
        raise DataError(
            f"{where}: length {cut.length} leaves {room} tokens for the context at stride {cut.stride}; "
            "raise length, or lower stride and question"
        )
    answer = _tokens_of(question.answers[0], offsets, where) if question.answers else None
    head, body, tail = (
        (encoded.ids[part], encoded.types[part]) for part in (keep, slice(begin, end), slice(end, None))
    )
    return _Pair(head, body, tail, offsets, answer)


def _bounds(encoded: Encoded, part: int, where: str) -> tuple[int, int]:
    """Return (first, last + 1) of the tokens of the question (part 0) or the context (part 1)."""
    positions = np.flatnonzero(encoded.parts == part)
    if not len(positions):
        raise DataError(f"{where}: the {('question', 'context')[part]} has no tokens")
    return int(positions[0]), int(positions[-1]) + 1


def _tokens_of(answer: Span, offsets: np.ndarray, where: str) -> tuple[int, int]:
    """Return the first and last token that overlap an answer."""
    touching = (offsets[:, 1] > answer.start) & (offsets[:, 0] < answer.start + len(answer.text))
    positions = np.flatnonzero(touching & (offsets[:, 0] < offsets[:, 1]))
    if not len(positions):
        raise DataError(f"{where}: no token covers the answer {answer.text!r}")
    return int(positions[0]), int(positions[-1])


class _Entry(NamedTuple):
    """A question, and what its file says of a missing answer."""

    question: Question
    impossible: bool  # marked as having no answer
    empty: bool = False  # a flat row with empty lists of answers: no answer, if other rows have some


def _files_of(names: Sequence[str], split: str, folder: Path) -> list[str]:
    """Return the names of a split's file, or of all its shards (`train-00000-of-00002.parquet`)."""
    if not any(files.called(name, alias) for name in names for alias in files.CALLED[split]):
        return []
    mine = sorted(files.of_split(names, split, folder) or ())
    if len(mine) > 1 and not all(map(_SHARD.search, mine)):
        raise DataError(f"{folder} has {len(mine)} files for {split}: {', '.join(mine)}")
    return mine


def _is_flat(file: Path) -> bool:
    return table.form(file) == "parquet" or not packed.plain(file).endswith(".json") or table.is_list(file)


def _nested(file: Path) -> Iterator[_Entry]:
    try:
        with packed.reading(file) as stream:
            data = stream.read()
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise table.not_utf8(file, line, 0, data, error) from None
    tree = json_file.parse(content, str(file), DataError, halves=True)
    for title, article in enumerate(_list(tree, "data", str(file))):
        if isinstance(article, dict) and "context" in article and "paragraphs" not in article:
            yield _row(article, f"{file}: row {title + 1}", str(file))
            continue
        for number, paragraph in enumerate(_list(article, "paragraphs", f"{file}: article {title}")):
            where = f"{file}: article {title}, paragraph {number}"
            context = _text(paragraph, "context", where)
            for entry in _list(paragraph, "qas", where):
                name = _id(entry, where)
                where_asked = f"{file}: question {name!r}"
                answers = _list({"answers": [], **entry}, "answers", where_asked)
                yield _question(entry, name, context, answers, where_asked)


def _flat(file: Path) -> Iterator[_Entry]:
    wanted, spare = ("id", "context", "question"), ("answers", "is_impossible", "kind", "same_type")
    for number, row in table.rows(file, wanted, optional=spare):
        yield _row(row, table.place(file, number), str(file))


def _row(row: Mapping[str, Any], where: str, file: str) -> _Entry:
    """Read a flat row; its answers are {"text": […], "answer_start": […]} or a list, as in nested files."""
    name = _id(row, where)
    where, answers = f"{file}: question {name!r}", row.get("answers")
    flat = isinstance(answers, dict)
    if isinstance(answers, dict):
        texts, starts = (_list(answers, field, f"{where}: 'answers'") for field in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise DataError(f"{where} has {len(texts)} answers and {len(starts)} positions")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    given = [] if answers is None else _list({"answers": answers}, "answers", where)
    return _question(row, name, _text(row, "context", where), given, where)._replace(empty=flat and not given)


def _question(entry: Mapping[str, Any], name: str, context: str, given: Sequence[Any], where: str) -> _Entry:
    answers = tuple(_span(answer, context, where) for answer in given)
    impossible = entry.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{where}: 'is_impossible' is {impossible!r}, not true or false")
    if impossible and answers:
        raise DataError(f"{where} is marked impossible, but has the answer {answers[0].text!r}")
    kind = entry.get("kind", "")
    if not isinstance(kind, str):
        raise DataError(f"{where}: 'kind' is {kind!r}, not text")
    same_type = tuple(_span(span, context, where) for span in _list({"same_type": [], **entry}, "same_type", where))
    return _Entry(Question(name, _text(entry, "question", where), context, answers, kind, same_type), impossible)


def _id(entry: Any, where: str) -> str:
    """Return a question's id, which some files have as a number."""
    given = entry.get("id") if isinstance(entry, dict) else None
    return str(given) if type(given) is int else _text(entry, "id", where)


def _span(entry: Any, context: str, where: str) -> Span:
    text = _text(entry, "text", where)
    start = entry.get("answer_start")
    if not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"{where}: 'answer_start' of {text!r} is {start!r}, not a number of characters")
    actual = context[start : start + len(text)] if start >= 0 else ""
    if actual != text:
        there = f"the context has {actual!r} there" if actual else "that is outside the context"
        places = (at for at in range(len(context)) if context.startswith(text, at))
        nearest = min(places, key=lambda at: abs(at - start), default=None)
        hint = "the context does not contain it" if nearest is None else f"the nearest occurrence is at {nearest}"
        raise DataError(f"{where}: the answer {text!r} is not at character {start} ({there}); {hint}")
    return Span(text, start)


def _list(entry: Any, field: str, where: str) -> list[Any]:
    items = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(items, list):
        has = ", ".join(map(repr, list(entry)[:8])) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{where}: no list {field!r} (it has {has})")
    return items


def _text(entry: Any, field: str, where: str) -> str:
    text = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {field!r} is {text!r:.60}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {field!r} has a lone surrogate (half a character) at {error.start}") from None
    return text
