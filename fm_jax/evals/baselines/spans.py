"""Baselines for extractive question answering that do not read the text."""

import re
from collections.abc import Sequence

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.text.squad import Question

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")


def first_same_type(questions: Sequence[Question]) -> dict[str, str]:
    """Answer with the first span of the answer's type; the type is given, so only the right span is unknown.

    Raises:
        DataError: a question with an answer has no "same_type" spans.
    """
    if absent := [question.id for question in questions if question.answers and not question.same_type]:
        raise DataError(f"question {absent[0]!r} has no 'same_type' spans; this baseline needs them in the file")
    first = {question.id: min(question.same_type, key=lambda span: span.start, default=None) for question in questions}
    return {name: "" if span is None else span.text for name, span in first.items()}


def random_span(questions: Sequence[Question], *, seed: int) -> dict[str, str]:
    """Answer with a random run of as many context words as the first answer has; "" if there is no answer."""
    rng, spans = np.random.default_rng(seed), {}
    for question in questions:
        words = list(re.finditer(r"\S+", question.context))
        count = len(question.answers[0].text.split()) if question.answers else 0
        first = int(rng.integers(len(words) - count + 1)) if count else 0
        spans[question.id] = question.context[words[first].start() : words[first + count - 1].end()] if count else ""
    return spans


def nearest_sentence(questions: Sequence[Question]) -> dict[str, str]:
    """Answer with the whole sentence that shares most words with the question; on a tie the first."""
    answers = {}
    for question in questions:
        asked = _words(question.text)
        sentences = [match.group().strip() for match in _SENTENCE.finditer(question.context)]
        sentences = [sentence for sentence in sentences if _words(sentence)] or [question.context]
        answers[question.id] = max(sentences, key=lambda sentence: len(_words(sentence) & asked))
    return answers


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
