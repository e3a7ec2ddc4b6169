"""Scores by hand-made cases; decoding against every span of every window, one after another."""

import re
import string
from dataclasses import dataclass

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text.encoded import Encoded
from fm_jax.data.text.squad import Cut, Question, Span, Windows
from fm_jax.evals.scores import squad
from fm_jax.evals.scores.squad import Candidate, Decoded
from tests.close import close

CONTEXT = "Zoë Müller lives in São Paulo. Łukasz is a bookbinder, born in 1950."


@dataclass
class Pieces:
    """A tokenizer of pieces of three letters that says as little as `Windows` needs."""

    vocab_size: int = 1000
    pad_id: int = 0
    fingerprint: str = "pieces"

    def encode_pairs(self, first, second):
        return [self.encode(*pair) for pair in zip(first, second, strict=True)]

    def encode(self, first, second):
        ids, types, offsets, parts = [1], [0], [(0, 0)], [-1]
        for number, text in enumerate((first, second)):
            for word in re.finditer(r"\S+", text):
                for at in range(word.start(), word.end(), 3):
                    end = min(at + 3, word.end())
                    ids.append(3 + sum(map(ord, text[at:end])) % 900)
                    types.append(number)
                    offsets.append((at, end))
                    parts.append(number)
            ids, types, offsets, parts = [*ids, 2], [*types, number], [*offsets, (0, 0)], [*parts, -1]
        words = [-1] * len(ids)
        return Encoded(*(np.array(part, np.int32) for part in (ids, types, offsets, words, parts)))


def asked(name="q", context=CONTEXT, answers=("São Paulo",), kind=""):
    spans = tuple(Span(text, context.index(text)) for text in answers)
    return Question(name, "Where does Zoë live ?", context, spans, kind)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat,\tsat!", "cat sat"),
        ("A an THE", ""),
        ("another theatre an-d", "another theatre and"),  # articles are whole words; a hyphen vanishes before that
        ("the-end", "theend"),
        ("U.S.A.", "usa"),
        ("$1,000", "1000"),
        ("São  Paulo", "são paulo"),
        ("ÉCOLE d’Été", "école d’été"),  # only ASCII punctuation goes
        ("“the” cat", "“ ” cat"),  # so a quoted article is one
        ("Straße", "straße"),  # lower(), not casefold()
        ("no\u00a0break", "no break"),  # str.split knows it
        ("thé a", "thé"),  # é is a letter, so this is no article
        ("", ""),
    ],
)
def test_texts_are_normalised_as_the_official_script_does(text, wanted):
    assert squad.normalize(text) == wanted


@pytest.mark.parametrize("mark", string.punctuation)
def test_every_ascii_punctuation_mark_is_dropped(mark):
    assert squad.normalize(f"x{mark}y") == "xy"


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Denver Broncos", ["Denver Broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("Denver Denver", ["Denver Broncos"], 0, 0.5),  # a word counts as often as both have it
        ("Broncos of Denver", ["Denver Broncos"], 0, 0.8),
        ("Paris", ["Rome", "in Paris", "PARIS!"], 1, 1),  # the best of several
        ("in Rome", ["Rome", "in Paris"], 0, 2 / 3),
        ("", ["Rome"], 0, 0),
        ("", [], 1, 1),
        ("Rome", [], 0, 0),
        ("the", ["The"], 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, f1):
    assert squad.exact_match(prediction, answers) == exact
    close(squad.f1(prediction, answers), f1, 1e-9)


def test_scores_are_told_apart_by_kind_and_by_whether_there_is_an_answer():
    questions = [asked("a", kind="type"), asked("b", kind="binding"), asked("c", kind="binding")]
    found = squad.score(questions, {"a": "São Paulo", "b": "Paulo", "c": "Rome"})
    assert list(found) == ["all", "binding", "type"]
    close((found["all"].exact, found["all"].f1), (1 / 3, (1 + 2 / 3) / 3), 1e-9)
    close((found["binding"].exact, found["binding"].f1), (0.0, 1 / 3), 1e-9)
    assert (found["all"].count, found["binding"].count) == (3, 2)
    assert found["type"] == squad.Score(1.0, 1.0, 1)
    none = Question("d", "Who?", CONTEXT, ())
    found = squad.score([*questions, none], {"a": "", "b": "", "c": "", "d": ""})
    assert (found["answerable"].count, found["answerable"].exact) == (3, 0.0)
    assert (found["unanswerable"].count, found["unanswerable"].exact) == (1, 1.0)


def test_a_question_without_a_prediction_is_named():
    with pytest.raises(DataError, match="1 questions have no prediction; the first is 'b'"):
        squad.score([asked("a"), asked("b")], {"a": ""})
    with pytest.raises(DataError, match="no questions"):
        squad.score([], {})


def brute_force(starts, ends, windows, longest):
    """Return {id: [(score, start, text)]} of all spans there are."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in range(len(windows)):
        question = windows.questions[windows.places[row, 0]]
        encoded = Pieces().encode(question.text, question.context)
        before = encoded.types.tolist().index(1)
        first, last = windows.places[row, 1:]
        spans = found.setdefault(question.id, {})
        for i in range(first, last):
            for j in range(i, min(i + longest, last)):
                value = float(starts[row, before + i - first]) + float(ends[row, before + j - first])
                key = encoded.offsets[before + i][0], encoded.offsets[before + j][1]
                spans[key] = max(value, spans.get(key, -np.inf))
    contexts = {question.id: question.context for question in windows.questions}
    return {
        name: sorted(((value, a, contexts[name][a:b]) for (a, b), value in spans.items()), key=lambda x: -x[0])
        for name, spans in found.items()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 4, 100])
def test_decoding_equals_the_search_of_every_span(seed, longest):
    rng = np.random.default_rng(seed)
    windows = Windows([asked("a"), asked("b", CONTEXT[:30])], Pieces(), Cut(24, 3, 64))
    assert len(windows) > 3
    starts, ends = rng.normal(size=(2, len(windows), 24)).astype(np.float32)
    found = squad.decode(starts, ends, windows, best=7, longest=longest)
    wanted = brute_force(starts, ends, windows, longest)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        best = wanted[name][:7]
        assert [(c.start, c.text) for c in one.candidates] == [(start, text) for _, start, text in best]
        close([c.score for c in one.candidates], [value for value, _, _ in best])
        mine = windows.places[:, 0] == list(found).index(name)
        close(one.null, float((starts[mine, 0] + ends[mine, 0]).min()))


def test_what_lies_outside_the_context_is_never_an_answer():
    windows = Windows([asked()], Pieces(), Cut(24, 3, 64))
    starts, ends = np.full((2, len(windows), 24), 100.0)
    for row in range(len(windows)):
        begin, offsets = windows.context(row)
        starts[row, begin : begin + len(offsets)] = ends[row, begin : begin + len(offsets)] = 0
    found = squad.decode(starts, ends, windows)["q"]
    assert {candidate.score for candidate in found.candidates} == {0.0}
    assert all(CONTEXT[c.start :].startswith(c.text) for c in found.candidates)


def test_an_answer_is_cut_out_of_the_context_letter_by_letter():
    question = asked()
    windows = Windows([question], Pieces(), Cut(64, 16, 64))
    row = windows[0]
    starts, ends = np.eye(64)[[row["start"]]], np.eye(64)[[row["end"]]]
    found = squad.decode(starts, ends, windows)["q"].candidates[0]
    assert (found.text, found.start, found.score) == ("São Paulo.", CONTEXT.index("São"), 2.0)  # its piece is "lo."
    assert squad.exact_match(found.text, ["São Paulo"])


def test_white_space_at_the_ends_of_an_answer_is_left_out():
    class Spaced(Pieces):
        """Like byte-level pieces: a word holds the space before it."""

        def encode(self, first, second):
            encoded = super().encode(first, second)
            for k in np.flatnonzero(encoded.parts == 1):
                encoded.offsets[k, 0] -= second[encoded.offsets[k, 0] - 1 : encoded.offsets[k, 0]] == " "
            return encoded

    windows = Windows([asked()], Spaced(), Cut(64, 16, 64))
    row = windows[0]
    found = squad.decode(np.eye(64)[[row["start"]]], np.eye(64)[[row["end"]]], windows)["q"].candidates[0]
    assert (found.text, found.start) == ("São Paulo.", CONTEXT.index("São"))


@pytest.mark.parametrize(
    ("starts", "ends", "options", "error", "said"),
    [
        (np.zeros((1, 64)), np.zeros((1, 63)), {}, DataError, "start and end logits must be .1, T."),
        (np.zeros((2, 64)), np.zeros((2, 64)), {}, DataError, "start and end logits must be .1, T."),
        (np.full((1, 64), np.nan), np.zeros((1, 64)), {}, DataError, "'q' has logits that are not finite"),
        (np.zeros((1, 64)), np.zeros((1, 64)), {"longest": 0}, ConfigError, "at least 1"),
    ],
)
def test_logits_that_cannot_be_decoded_are_refused(starts, ends, options, error, said):
    with pytest.raises(error, match=said):
        squad.decode(starts, ends, Windows([asked()], Pieces(), Cut(64, 16, 64)), **options)


def decoded(text, margin):
    return Decoded((Candidate(text, 0, 0.0),), margin)


def test_no_answer_is_given_where_it_is_better_by_more_than_the_threshold():
    found = {"a": decoded("x", -1.0), "b": decoded("y", 0.5), "c": decoded("z", 2.0)}
    assert squad.answers(found) == {"a": "x", "b": "y", "c": "z"}
    assert squad.answers(found, 0.5) == {"a": "x", "b": "y", "c": ""}
    assert squad.answers(found, -2) == dict.fromkeys("abc", "")


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_as_good_as_any(seed):
    rng = np.random.default_rng(seed)
    questions = [asked(str(n)) if rng.random() < 0.5 else Question(str(n), "Who?", CONTEXT, ()) for n in range(12)]
    margins = rng.integers(-2, 3, 12).astype(float)  # few values, so many questions share one
    found = {str(n): decoded("São Paulo" if rng.random() < 0.7 else "Paulo", margins[n]) for n in range(12)}
    chosen = squad.best_threshold(questions, found)
    tried = [squad.score(questions, squad.answers(found, t))["all"].f1 for t in (-3, -2, -1, 0, 1, 2, 3)]
    close(squad.score(questions, squad.answers(found, chosen))["all"].f1, max(tried), 1e-9)


def test_bars_show_exact_matches_and_f1_of_every_way_and_kind(tmp_path, drawn):
    ours = {"all": squad.Score(0.5, 0.75, 8), "type": squad.Score(0.9, 0.9, 3)}
    squad.bars(tmp_path / "bars.png", {"ours": ours, "chance": {k: squad.Score(0.1, 0.2, 3) for k in ours}})
    (axes,) = drawn
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.9, 0.1, 0.1]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.75, 0.9], [0.2, 0.2]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all (8)", "type (3)"]
    assert (tmp_path / "bars.png").stat().st_size > 5000
    with pytest.raises(DataError, match="no scores to draw"):
        squad.bars(tmp_path / "none.png", {})
