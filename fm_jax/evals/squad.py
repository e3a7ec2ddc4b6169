"""Answers out of span logits, and their exact match and F1 as SQuAD counts them.

The normaliser and F1 are those of the official scripts (Rajpurkar et al. 2016; 2018 for questions without an answer).
Decoding is exact: every span of up to `longest` tokens of every window is considered, not only the pairs among each
side's best logits, and its answer is the stretch of characters of the context that its tokens cover.

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
from fm_jax.data.squad import Question, Span, Windows
from fm_jax.evals import style

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """Means over questions, in [0, 1]."""

    exact: float
    f1: float
    count: int


@dataclass(frozen=True)
class Candidate:
    """A span of the context and the sum of its start and end logits."""

    text: str
    start: int  # character
    score: float


@dataclass(frozen=True)
class Decoded:
    """What the logits say of one question."""

    candidates: tuple[Candidate, ...]  # best first, no two alike
    null: float  # score of "no answer": the least over the windows, for one window without it says nothing

    @property
    def margin(self) -> float:
        """How much better "no answer" scores than the best span."""
        return self.null - self.candidates[0].score


def normalize(text: str) -> str:
    """Lower the case, drop ASCII punctuation, then the words a, an and the, then all but single spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 where the prediction equals one of the answers, both normalised; without answers, where it is ""."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1 of normalised words over the answers.

    Where either side has no word left it is 1 if both have none, else 0, as in the v2.0 script; that of v1.1 says 0 to
    "the" for "The".
    """
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers or ("",))


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, Score]:
    """Return the scores of "all" questions, of each kind, and with v2.0 of the "answerable" and the "unanswerable".

    Raises:
        DataError: no questions, or one without a prediction ("" says that there is no answer).
    """
    if not questions:
        raise DataError("there are no questions to score")
    if absent := [question.id for question in questions if question.id not in predictions]:
        raise DataError(f"{len(absent)} questions have no prediction, the first of them {absent[0]!r}")
    groups: dict[str, list[tuple[float, float]]] = {"all": []}
    mixed = any(not question.answers for question in questions)
    for question in questions:
        answers = [answer.text for answer in question.answers]
        found = exact_match(predictions[question.id], answers), f1(predictions[question.id], answers)
        names = {"all", question.kind} | ({"answerable" if answers else "unanswerable"} if mixed else set())
        for name in names - {""}:
            groups.setdefault(name, []).append(found)
    means = {name: np.mean(found, axis=0) for name, found in groups.items()}
    return {
        name: Score(float(means[name][0]), float(means[name][1]), len(groups[name]))
        for name in ("all", *sorted(groups.keys() - {"all"}))
    }


def decode(
    starts: np.ndarray, ends: np.ndarray, windows: Windows, *, best: int = 20, longest: int = 30
) -> dict[str, Decoded]:
    """Return for each question's id its `best` spans over all its windows.

    A span starts no later than it ends, has at most `longest` tokens, and lies in the context. The same characters
    found in two windows count once, with the better score.

    Args:
        starts: [N, T] logits of each row of `windows`, in order.
        ends: [N, T].
        windows: where the rows came from.
        best: candidates kept.
        longest: tokens.

    Raises:
        DataError: logits of another shape than the windows, or that are not finite.
        ConfigError: `best` or `longest` below 1.
    """
    if best < 1 or longest < 1:
        raise ConfigError(f"best ({best}) and longest ({longest}) must be at least 1")
    if starts.shape != ends.shape or starts.ndim != 2 or len(starts) != len(windows):
        raise DataError(f"{len(windows)} windows cannot have start logits {starts.shape} and end logits {ends.shape}")
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
    """Return each question's best span, or "" where "no answer" is better than it by more than the threshold.

    Without a threshold every question is answered (v1.1).
    """
    return {
        name: "" if threshold is not None and one.margin > threshold else one.candidates[0].text
        for name, one in decoded.items()
    }


def best_threshold(questions: Sequence[Question], decoded: Mapping[str, Decoded]) -> float:
    """Return the threshold for `answers` with the highest F1 on these questions; of equals the lowest.

    Choose it on one split and score another.
    """
    margins = np.array([decoded[question.id].margin for question in questions])
    gains = []  # of answering rather than saying ""
    for question in questions:
        texts = [answer.text for answer in question.answers]
        gains.append(f1(decoded[question.id].candidates[0].text, texts) - f1("", texts))
    order = np.argsort(margins, kind="stable")
    ordered, total = margins[order], np.concatenate([[0.0], np.cumsum(np.array(gains)[order])])
    # questions of one margin are answered together: only the sums behind the last of each can be had
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]])
    cut = int(cuts[np.argmax(total[cuts])])
    return float(ordered[cut - 1]) if cut else float(np.nextafter(ordered[0], -np.inf))


def bars(png: Path, found: Mapping[str, Mapping[str, Score]], *, title: str = "") -> None:
    """Draw {way: {kind: score}}: for each kind a bar a way for exact match, with its F1 as a tick; ours comes first.

    Raises:
        DataError: no ways or no kinds.
        ConfigError: matplotlib is missing.
    """
    if not found or not (kinds := list(next(iter(found.values())))):
        raise DataError("there is no score to draw")
    first, height = next(iter(found.values())), 0.8 / len(found)
    with style.picture(png, 7.2, 1.2 + 0.22 * len(kinds) * (len(found) + 1)) as axes:
        for i, (way, scores) in enumerate(found.items()):
            places = np.arange(len(kinds)) + (i - (len(found) - 1) / 2) * height
            exact, overlap = ([getattr(scores[kind], side) for kind in kinds] for side in ("exact", "f1"))
            color = style.COLORS[i % len(style.COLORS)]
            axes.barh(places, exact, height=height * 0.9, color=color, label=way)
            axes.plot(overlap, places, "|", color=style.INK, markersize=7, label="F1" if i == len(found) - 1 else None)
            for place, value, ahead in zip(places, exact, overlap, strict=True):
                axes.text(max(value, ahead) + 0.012, place, f"{value:.2f}", va="center", fontsize=8.5)
        axes.set_yticks(range(len(kinds)), [f"{kind} ({first[kind].count})" for kind in kinds])
        axes.invert_yaxis()  # the first on top
        axes.set_xlim(0, 1.08)
        axes.set_xlabel("exact match (bars) and F1 (ticks); in brackets: how many questions")
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.figure.legend(loc="outside lower center", ncols=min(len(found) + 1, 3))


@dataclass
class _Gathered:
    """The spans of one question, by their characters, and the best score of each."""

    question: Question
    spans: dict[tuple[int, int], float] = field(default_factory=dict)
    null: float = float("inf")

    def add(self, begin: int, end: int, value: float) -> None:
        text = self.question.context[begin:end]
        begin += len(text) - len(text.lstrip())  # byte-level tokens hold the space before them
        end = begin + len(text.strip())
        if begin < end and value > self.spans.get((begin, end), -np.inf):
            self.spans[begin, end] = value

    def decoded(self, best: int) -> Decoded:
        ranked = sorted(self.spans.items(), key=lambda item: (-item[1], item[0]))[:best]
        if not ranked:
            raise DataError(f"question {self.question.id!r} has no span with a character to it")
        spans = (Span(self.question.context[begin:end], begin) for (begin, end), _ in ranked)
        pairs = zip(spans, ranked, strict=True)
        return Decoded(tuple(Candidate(span.text, span.start, value) for span, (_, value) in pairs), self.null)


def _spans(starts: np.ndarray, ends: np.ndarray, best: int, longest: int) -> list[tuple[int, int, float]]:
    """Return (first, last, score) of the best spans among a context's tokens, of 1 to `longest` tokens."""
    count, longest = len(starts), min(longest, len(starts))
    table = np.full((count, longest), -np.inf)  # row: first token, column: tokens more
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
