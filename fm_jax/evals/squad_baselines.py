"""What can be had of extractive questions without reading: the numbers to beat."""

import re
from collections.abc import Sequence

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.squad import Question

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")


def first_alike(questions: Sequence[Question]) -> dict[str, str]:
    """Answer with the first span of the right type, known from outside: all of reading but whom a sentence is about.

    Raises:
        DataError: a question has an answer, but its file does not say which spans are alike.
    """
    if absent := [question.id for question in questions if question.answers and not question.alike]:
        raise DataError(f"question {absent[0]!r} has no 'alike' spans; this baseline needs them")
    first = {question.id: min(question.alike, key=lambda span: span.start, default=None) for question in questions}
    return {name: "" if span is None else span.text for name, span in first.items()}


def random_span(questions: Sequence[Question], *, seed: int) -> dict[str, str]:
    """Answer with as many words of the context in a row as the first answer has, anywhere; "" if it has none."""
    rng, found = np.random.default_rng(seed), {}
    for question in questions:
        words = list(re.finditer(r"\S+", question.context))
        count = len(question.answers[0].text.split()) if question.answers else 0
        first = int(rng.integers(len(words) - count + 1)) if count else 0
        found[question.id] = question.context[words[first].start() : words[first + count - 1].end()] if count else ""
    return found


def nearest_sentence(questions: Sequence[Question]) -> dict[str, str]:
    """Answer with the whole sentence that shares most words with the question; of equals the first."""
    found = {}
    for question in questions:
        asked = _words(question.text)
        sentences = [match.group().strip() for match in _SENTENCE.finditer(question.context)]
        sentences = [sentence for sentence in sentences if _words(sentence)] or [question.context]
        found[question.id] = max(sentences, key=lambda sentence: len(_words(sentence) & asked))
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
