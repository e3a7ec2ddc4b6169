"""Answers from span logits, and their exact match and F1 by SQuAD's official rules.

Normalisation and F1 are those of the official scripts (Rajpurkar et al. 2016; 2018 for questions without an answer).
Decoding is exact: every span of up to `longest` tokens of every window is considered, not only pairs of the best start
and end logits. The answer is the context's text that the span's tokens cover.

Dims: N windows, T tokens of a window.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text.squad import Question, Span, Windows
from fm_jax.evals.report import theme

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """Means over `count` questions, in [0, 1]."""

    exact: float
    f1: float
    count: int


@dataclass(frozen=True)
class Candidate:
    """A span of the context and the sum of its start and end logits."""

    text: str
    start: int  # first character
    score: float


@dataclass(frozen=True)
class Decoded:
    """Decoded spans of one question, and the score of "no answer"."""

    candidates: tuple[Candidate, ...]  # best first, all different
    null: float  # score of "no answer": the minimum over windows, because the answer need only be in one of them

    @property
    def margin(self) -> float:
        """Score of "no answer" minus the score of the best span."""
        return self.null - self.candidates[0].score


def normalize(text: str) -> str:
    """Lowercase; remove ASCII punctuation and the words a, an, the; collapse white space."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the normalised prediction equals a normalised answer (or "" if there are no answers), else 0.0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1 of normalised words over the answers.

    If either side has no words after normalisation, F1 is 1 if both have none and 0 otherwise, as in the v2.0 script.
    (The v1.1 script gives 0 for "the" against "The".)
    """
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers or ("",))


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, Score]:
    """Return the scores of "all" questions, of each kind, and for v2.0 of "answerable" and "unanswerable" ones.

    Raises:
        DataError: no questions, or one without a prediction ("" predicts that there is no answer).
    """
    if not questions:
        raise DataError("there are no questions to score")
    if absent := [question.id for question in questions if question.id not in predictions]:
        raise DataError(f"{len(absent)} questions have no prediction; the first is {absent[0]!r}")
    groups: dict[str, list[tuple[float, float]]] = {"all": []}
    mixed = any(not question.answers for question in questions)
    for question in questions:
        answers = [answer.text for answer in question.answers]
        values = exact_match(predictions[question.id], answers), f1(predictions[question.id], answers)
        names = {"all", question.kind} | ({"answerable" if answers else "unanswerable"} if mixed else set())
        for name in names - {""}:
            groups.setdefault(name, []).append(values)
    means = {name: np.mean(members, axis=0) for name, members in groups.items()}
    return {
        name: Score(float(means[name][0]), float(means[name][1]), len(groups[name]))
        for name in ("all", *sorted(groups.keys() - {"all"}))
    }


def decode(
    starts: np.ndarray, ends: np.ndarray, windows: Windows, *, best: int = 20, longest: int = 30
) -> dict[str, Decoded]:
    """Return {question id: its `best` spans over all its windows}.

    A span lies in the context, has at most `longest` tokens, and does not end before it starts. A span that occurs in
    two windows counts once, with the better score.

    Args:
        starts: start logits [N, T] of the rows of `windows`, in order.
        ends: end logits [N, T].
        windows: the rows.
        best: number of candidates to keep.
        longest: maximum tokens of a span.

    Raises:
        DataError: logits whose shape does not match the windows, or that are not finite.
        ConfigError: `best` or `longest` below 1.
    """
    if best < 1 or longest < 1:
        raise ConfigError(f"best ({best}) and longest ({longest}) must be at least 1")
    if starts.shape != ends.shape or starts.ndim != 2 or len(starts) != len(windows):
        raise DataError(
            f"start and end logits must be [{len(windows)}, T], one row per window, not {starts.shape} and {ends.shape}"
        )
    gathered = [_Gathered(question) for question in windows.questions]
    for row in range(len(windows)):
        begin, offsets = windows.context(row)
        here = slice(begin, begin + len(offsets))
        mine = gathered[windows.places[row, 0]]
        if not (np.isfinite(starts[row, here]).all() and np.isfinite(ends[row, here]).all()):
            raise DataError(f"{windows.name}: question {mine.question.id!r} has logits that are not finite")
        mine.null = min(mine.null, float(starts[row, 0] + ends[row, 0]))
        for first, last, value in _spans(starts[row, here], ends[row, here], best, longest):
            mine.add(int(offsets[first, 0]), int(offsets[last, 1]), value)
    return {mine.question.id: mine.decoded(best) for mine in gathered}


def answers(decoded: Mapping[str, Decoded], threshold: float | None = None) -> dict[str, str]:
    """Return each question's best span, or "" if the score of "no answer" exceeds it by more than the threshold.

    Without a threshold every question is answered (v1.1).
    """
    return {
        name: "" if threshold is not None and question.margin > threshold else question.candidates[0].text
        for name, question in decoded.items()
    }


def best_threshold(questions: Sequence[Question], decoded: Mapping[str, Decoded]) -> float:
    """Return the threshold for `answers` with the highest F1 on these questions; on a tie the lowest.

    Choose it on one split and score another.
    """
    margins = np.array([decoded[question.id].margin for question in questions])
    gains = []  # F1 gained by answering instead of ""
    for question in questions:
        texts = [answer.text for answer in question.answers]
        gains.append(f1(decoded[question.id].candidates[0].text, texts) - f1("", texts))
    order = np.argsort(margins, kind="stable")
    ordered, total = margins[order], np.concatenate([[0.0], np.cumsum(np.array(gains)[order])])
    # Questions of equal margin are answered together, so only the sums after the last of each margin are possible.
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]])
    cut = int(cuts[np.argmax(total[cuts])])
    return float(ordered[cut - 1]) if cut else float(np.nextafter(ordered[0], -np.inf))


def bars(png: Path, methods: Mapping[str, Mapping[str, Score]], *, title: str = "") -> None:
    """Draw {method: {kind: score}}: one bar per kind and method for exact match, with F1 as a tick; ours comes first.

    Raises:
        DataError: no methods or no kinds.
        ConfigError: matplotlib is missing.
    """
    if not methods or not (kinds := list(next(iter(methods.values())))):
        raise DataError("there are no scores to draw")
    first, height = next(iter(methods.values())), 0.8 / len(methods)
    with theme.picture(png, 7.2, 1.2 + 0.22 * len(kinds) * (len(methods) + 1)) as axes:
        for i, (method, scores) in enumerate(methods.items()):
            places = np.arange(len(kinds)) + (i - (len(methods) - 1) / 2) * height
            exact, overlap = ([getattr(scores[kind], side) for kind in kinds] for side in ("exact", "f1"))
            color = theme.COLORS[i % len(theme.COLORS)]
            axes.barh(places, exact, height=height * 0.9, color=color, label=method)
            label = "F1" if i == len(methods) - 1 else None
            axes.plot(overlap, places, "|", color=theme.INK, markersize=7, label=label)
            for place, value, ahead in zip(places, exact, overlap, strict=True):
                axes.text(max(value, ahead) + 0.012, place, f"{value:.2f}", va="center", fontsize=8.5)
        axes.set_yticks(range(len(kinds)), [f"{kind} ({first[kind].count})" for kind in kinds])
        axes.invert_yaxis()  # the first on top
        axes.set_xlim(0, 1.08)
        axes.set_xlabel("exact match (bars) and F1 (ticks); in brackets: number of questions")
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.figure.legend(loc="outside lower center", ncols=min(len(methods) + 1, 3))


@dataclass
class _Gathered:
    """The character spans of one question with the best score of each."""

    question: Question
    spans: dict[tuple[int, int], float] = field(default_factory=dict)
    null: float = float("inf")

    def add(self, begin: int, end: int, value: float) -> None:
        text = self.question.context[begin:end]
        begin += len(text) - len(text.lstrip())  # byte-level tokens include the space before them
        end = begin + len(text.strip())
        if begin < end and value > self.spans.get((begin, end), -np.inf):
            self.spans[begin, end] = value

    def decoded(self, best: int) -> Decoded:
        ranked = sorted(self.spans.items(), key=lambda item: (-item[1], item[0]))[:best]
        if not ranked:
            raise DataError(f"question {self.question.id!r} has no span that is not blank")
        spans = (Span(self.question.context[begin:end], begin) for (begin, end), _ in ranked)
        pairs = zip(spans, ranked, strict=True)
        return Decoded(tuple(Candidate(span.text, span.start, value) for span, (_, value) in pairs), self.null)


def _spans(starts: np.ndarray, ends: np.ndarray, best: int, longest: int) -> list[tuple[int, int, float]]:
    """Return (first, last, score) of the best spans of 1 to `longest` tokens, from logits [n] of a context's tokens."""
    count, longest = len(starts), min(longest, len(starts))
    table = np.full((count, longest), -np.inf)  # row: first token, column: number of further tokens
    for more in range(longest):
        table[: count - more, more] = starts[: count - more].astype(np.float64) + ends[more:]
    flat = table.ravel()
    top = np.argpartition(-flat, min(best, flat.size) - 1)[:best]
    return [
        (int(at // longest), int(at // longest + at % longest), float(flat[at])) for at in top if np.isfinite(flat[at])
    ]


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer))
