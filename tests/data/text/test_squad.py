"""SQuAD files are read or refused by name; windows hold every answer, letter by letter, whatever the tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream import loader
from fm_jax.data.text import squad, tokenizer
from fm_jax.data.text.squad import Cut, Question, Span, Windows
from fm_jax.worlds.language import people
from tests.data.kinds import parquet, put

CONTEXT = "Zoë Müller lives in São Paulo. Łukasz, a bookbinder, was born in 1950 🎉 in Kraków."
TEXTS = [CONTEXT, "Where does Zoë Müller live? When was Łukasz born?", "a book is bound in Paul's town, in 19 50"] * 3


@pytest.fixture(scope="module")
def wordpiece():
    return tokenizer.train_wordpiece(TEXTS, 90)


@pytest.fixture(scope="module")
def bytelevel():
    """RoBERTa's form: byte-level pieces, two separators between the texts, one token type."""
    from tokenizers import processors

    made = tokenizer.train(TEXTS, 300)
    end = (tokenizer.END, made.end_id)
    made._inner.post_processor = processors.RobertaProcessing(end, end, trim_offsets=False, add_prefix_space=False)
    return made


def tree(**changes):
    answer = {"text": "São Paulo", "answer_start": CONTEXT.index("São")} | changes.pop("answer", {})
    entry = {"id": "q1", "question": "Where does Zoë live?", "answers": [answer]} | changes
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [entry]}]}]}


def written(folder: Path, content, name="train.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder / name


def asked(*answers, text="Where does Zoë live?", context=CONTEXT, name="q"):
    return Question(name, text, context, tuple(Span(answer, context.index(answer)) for answer in answers))


def test_a_file_of_version_1_is_read_with_all_its_answers(tmp_path: Path) -> None:
    second = {"text": "in São Paulo", "answer_start": CONTEXT.index("in S")}
    content = tree(kind="binding", same_type=[{"text": "Kraków", "answer_start": CONTEXT.index("Kraków")}])
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"].append(second)
    (question,) = squad.read(written(tmp_path, content))
    spans = tuple(Span(text, CONTEXT.index(text)) for text in ("São Paulo", "in São Paulo", "Kraków"))
    assert question == Question("q1", "Where does Zoë live?", CONTEXT, spans[:2], "binding", spans[2:])


def test_a_file_of_version_2_has_questions_without_answers(tmp_path: Path) -> None:
    plausible = [{"text": "Kraków", "answer_start": 0}]  # not looked at: nothing is learnt from them
    content = tree(answers=[], is_impossible=True, plausible_answers=plausible)
    (question,) = squad.read(written(tmp_path, content))
    assert question.answers == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"train.json is not JSON"),
        ("[" * 100_000, r"train.json: row 1: not JSON"),
        ('{"data": ' + "[" * 100_000, r"train.json is not JSON"),
        ([], r"train.json contains no questions"),
        ([3], r"train.json: row 1: the line has int, not an object"),
        ({"rows": []}, r"no list 'data' \(it has 'rows'\)"),
        ({"data": []}, r"contains no questions"),
        ({"data": [{"title": "t"}]}, r"article 0: no list 'paragraphs'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"article 0, paragraph 0: 'context' is None, not text"),
        (tree(id=7.5), r"paragraph 0: 'id' is 7.5, not text"),
        (tree(id=True), r"paragraph 0: 'id' is True, not text"),
        (tree(question=" "), r"question 'q1': 'question' is ' ', not text"),
        (tree(question="half \ud83c"), r"question 'q1': 'question' has a lone surrogate .* at 5"),
        (tree(answers={}), r"question 'q1': no list 'answers'"),
        (tree(is_impossible=True), r"question 'q1' is marked impossible, but has the answer 'São Paulo'"),
        (tree(is_impossible="no"), r"'is_impossible' is 'no'"),
        (tree(kind=3), r"'kind' is 3, not text"),
        (tree(answer={"text": ""}), r"question 'q1': 'text' is '', not text"),
        (tree(answer={"answer_start": "20"}), r"'answer_start' of 'São Paulo' is '20'"),
        (tree(answer={"answer_start": True}), r"'answer_start' of 'São Paulo' is True"),
        (
            tree(answer={"answer_start": 21}),
            r"'São Paulo' is not at character 21 \(.* has 'ão Paulo.' there\).* at 20",
        ),
        (
            tree(answer={"answer_start": -1}),
            r"at character -1 \(that is outside the context\); the nearest .* 20",
        ),
        (
            tree(answer={"answer_start": 999}),
            r"at character 999 \(that is outside the context\); the nearest .* 20",
        ),
        (
            tree(answer={"text": "Rome"}),
            r"the answer 'Rome' is not at character 20 .*; the context does not contain it",
        ),
        (tree(same_type=[{"text": "Rome", "answer_start": 0}]), r"question 'q1': the answer 'Rome' is not at"),
    ],
)
def test_a_bad_file_is_refused_by_its_name_and_the_questions(content, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as error:
        squad.read(written(tmp_path, content))
    assert "train.json" in str(error.value) and "\n" not in str(error.value)


def test_a_question_without_an_answer_among_others_is_named(tmp_path: Path) -> None:
    content = tree()
    content["data"] += tree(id="q2", answers=[])["data"]
    with pytest.raises(DataError, match=r"question 'q2' has no answer; add one, or mark it"):
        squad.read(written(tmp_path, content))


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "parquet", "data.json"])
def test_the_flat_form_gives_the_same_questions(form: str, tmp_path: Path) -> None:
    spans = {"text": ["São Paulo"], "answer_start": [CONTEXT.index("São")]}
    head = {"title": "t", "context": CONTEXT, "question": "Where does Zoë live?"}
    rows = [{"id": 7, **head, "answers": spans}, {"id": 8, **head, "answers": {"text": [], "answer_start": []}}]
    file = tmp_path / f"train.{form}"
    if form == "parquet":
        put(file, parquet({name: [row[name] for row in rows] for name in rows[0]}))
    elif form.startswith("jsonl"):
        put(file, "\n".join(map(json.dumps, rows)).encode())
    else:
        put(file, json.dumps(rows if form == "json" else {"data": rows}).encode())
    question = asked("São Paulo", name="7")
    assert squad.read(file) == (question, replace(question, id="8", answers=()))


def test_flat_answers_of_two_lengths_are_refused(tmp_path: Path) -> None:
    row = {"id": "a", "context": CONTEXT, "question": "Where?", "answers": {"text": ["Zoë"], "answer_start": []}}
    with pytest.raises(DataError, match=r"train.jsonl: question 'a' has 1 answers and 0 positions"):
        squad.read(put(tmp_path / "train.jsonl", json.dumps(row).encode()))


def test_a_file_without_answers_is_for_answering_alone(tmp_path: Path) -> None:
    bare = tree(id="b")
    del bare["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    for content in (bare, tree(id="b", answers=[])):
        written(tmp_path, tree(), "train.json")
        written(tmp_path, tree(), "val.json")
        written(tmp_path, content, "test.json")
        found = squad.load(tmp_path)
        assert not squad.is_labelled(found["test"]) and found["test"][0].answers == ()
        assert squad.is_labelled(found["train"]) and squad.is_labelled(found["validation"])
        written(tmp_path, content, "val.json")
        with pytest.raises(DataError, match=r"val.json has no answers, but choosing the best step needs"):
            squad.load(tmp_path)
        written(tmp_path, content, "train.json")
        with pytest.raises(DataError, match=r"train.json has no answers, but training needs the train split's"):
            squad.load(tmp_path)


def test_shards_are_one_split(tmp_path: Path) -> None:
    for number in range(2):
        row = {"id": number, "context": CONTEXT, "question": "Where?", "answers": None}
        put(tmp_path / f"test-{number:05d}-of-00002.jsonl", json.dumps(row).encode())
    written(tmp_path, tree(), "train.json")
    written(tmp_path, tree(), "dev.json")
    assert [question.id for question in squad.load(tmp_path)["test"]] == ["0", "1"]


def test_an_id_that_occurs_twice_is_named(tmp_path: Path) -> None:
    content = tree()
    content["data"] *= 2
    with pytest.raises(DataError, match=r"train.json: question 'q1' occurs twice"):
        squad.read(written(tmp_path, content))


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    for name, mark in (("train-v1.1.json", "a"), ("dev-v1.1.json", "b"), ("trainees.json", "c")):
        written(tmp_path, tree(id=mark), name)
    found = squad.load(tmp_path)
    assert {split: [question.id for question in mine] for split, mine in found.items()} == {
        "train": ["a"],
        "validation": ["b"],
    }
    written(tmp_path, tree(), "dev-v2.0.json")
    with pytest.raises(DataError, match=r"2 files for validation: dev-v1.1.json, dev-v2.0.json"):
        squad.load(tmp_path)


def test_a_folder_without_what_training_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        squad.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="it has nothing"):
        squad.load(tmp_path)
    written(tmp_path, tree())
    with pytest.raises(DataError, match=r"needs a train\*.json and a .*; it has train.json"):
        squad.load(tmp_path)


@pytest.mark.parametrize("made", ["wordpiece", "bytelevel"])
@pytest.mark.parametrize("answer", ["Zoë Müller", "São Paulo", "o Pau", "bookbinder", "1950", "🎉", "Kraków.", CONTEXT])
def test_an_answer_is_found_letter_by_letter_through_pieces_and_unicode(made, answer, request) -> None:
    tokens = request.getfixturevalue(made)
    windows = Windows([asked(answer)], tokens, Cut(200, 50, 64))
    row, (before, offsets) = windows[0], windows.context(0)
    first, last = offsets[row["start"] - before], offsets[row["end"] - before]
    found = CONTEXT[first[0] : last[1]].strip()
    # a piece may be wider than the answer's end, but its neighbours must not touch the answer
    begin, end = CONTEXT.index(answer), CONTEXT.index(answer) + len(answer)
    assert answer in found and len(tokens.encode(found)) <= len(offsets)
    assert all(b <= begin or a >= end for a, b in offsets[: row["start"] - before])
    assert all(b <= begin or a >= end for a, b in offsets[row["end"] - before + 1 :])
    if answer not in ("o Pau",):
        assert found.removesuffix(".") == answer.removesuffix(".")


def test_a_row_is_question_and_context_as_the_tokenizer_frames_them(wordpiece) -> None:
    question = asked("São Paulo")
    windows, whole = Windows([question], wordpiece), wordpiece.encode_pair(question.text, question.context)
    row, count = windows[0], len(whole.ids)
    assert len(windows) == 1 and row["length"] == count
    np.testing.assert_array_equal(row["tokens"][:count], whole.ids)
    np.testing.assert_array_equal(row["types"][:count], whole.types)
    assert set(row["tokens"][count:]) == {wordpiece.pad_id} and not row["types"][count:].any()
    assert row["tokens"].shape == row["types"].shape == (384,)
    assert row["tokens"][0] == wordpiece.special("cls")


@pytest.mark.parametrize("cut", [Cut(26, 5, 8), Cut(24, 1, 64), Cut(24, 9, 4)])
def test_windows_lie_a_stride_apart_hold_every_token_and_the_answer_where_it_fits(wordpiece, cut: Cut) -> None:
    question = asked("bookbinder")
    windows, whole = Windows([question], wordpiece, cut), wordpiece.encode_pair(question.text, question.context)
    body, chars = whole.ids[whole.parts == 1], whole.offsets[whole.parts == 1]
    wanted = [
        k for k, (a, b) in enumerate(chars) if a < question.answers[0].start + 10 and b > question.answers[0].start
    ]
    firsts = windows.places[:, 1]
    assert len(windows) > 1 and set(np.diff(firsts)) == {cut.stride}
    assert windows.places[0, 1] == 0 and windows.places[-1, 2] == len(body)
    assert (windows.places[1:, 1] <= windows.places[:-1, 2]).all()
    assert (windows.places[:-1, 2] < len(body)).all()  # none after the one that reaches the end
    held = 0
    for number, (_, first, last) in enumerate(windows.places):
        row, (before, offsets) = windows[number], windows.context(number)
        np.testing.assert_array_equal(row["tokens"][before : before + last - first], body[first:last])
        np.testing.assert_array_equal(offsets, chars[first:last])
        assert row["tokens"][before - 1] == row["tokens"][row["length"] - 1] == wordpiece.special("sep")
        assert row["length"] == before + last - first + 1 <= cut.length
        assert row["types"].sum() == last - first + 1
        if first <= wanted[0] and wanted[-1] < last:
            held += 1
            assert (row["start"], row["end"]) == (before + wanted[0] - first, before + wanted[-1] - first)
        else:
            assert (row["start"], row["end"]) == (0, 0)
    assert 0 < held < len(windows)


def test_of_several_answers_the_first_is_learnt_and_without_one_the_front(wordpiece) -> None:
    rows = [Windows([question], wordpiece)[0] for question in (asked("1950", "São Paulo"), asked("1950"), asked())]
    assert rows[0]["start"] == rows[1]["start"] > 0
    assert rows[2]["start"] == rows[2]["end"] == 0


def test_a_long_question_loses_its_end(wordpiece) -> None:
    long = asked("1950", text="Where does Zoë live? " * 20)
    short = Windows([long], wordpiece, Cut(128, 30, 5))
    np.testing.assert_array_equal(short[0]["tokens"][1:6], wordpiece.encode(long.text)[:5])
    assert short[0]["tokens"][6] == wordpiece.special("sep")


def test_every_answer_of_the_generated_set_stands_in_a_window_and_most_whole(wordpiece, tmp_path: Path) -> None:
    people.write(tmp_path, people.Config(40, 5, 5))
    questions = squad.load(tmp_path)["train"]
    vocabulary = tokenizer.train_wordpiece([q.context for q in questions], 500)
    windows, found = Windows(questions, vocabulary, Cut(64, 12, 24)), set()
    assert len(windows) > len(questions)
    for number in range(len(windows)):
        row, (before, offsets) = windows[number], windows.context(number)
        if row["start"]:
            question = questions[windows.places[number, 0]]
            text = question.context[offsets[row["start"] - before, 0] : offsets[row["end"] - before, 1]]
            assert text == question.answers[0].text
            found.add(question.id)
    assert found == {question.id for question in questions}


def test_batches_carry_windows_and_the_fingerprint_follows_what_is_in_them(wordpiece) -> None:
    questions = [asked("1950", name="a"), asked("Kraków", name="b")]
    windows = Windows(questions, wordpiece, Cut(26, 5, 8))
    batch = next(iter(loader.Epoch(windows, 4)))
    assert batch["tokens"].shape == (4, 26) and batch["start"].dtype == np.int32
    assert Windows(questions, wordpiece, Cut(26, 5, 8)).fingerprint == windows.fingerprint
    others = [Windows(questions, wordpiece, Cut(26, 6, 8)), Windows(questions[:1], wordpiece, Cut(26, 5, 8))]
    assert windows.fingerprint not in {other.fingerprint for other in others}


@pytest.mark.parametrize(
    ("question", "cut", "said"),
    [
        (asked("1950"), Cut(12, 4, 64), r"train: question 'q': length 12 leaves -?\d+ tokens"),
        (asked("1950"), Cut(30, 28, 10), r"question 'q': length 30 leaves 19 tokens for the context at stride 28"),
        (asked("1950", text="\u200b"), Cut(), r"question 'q': the question has no tokens"),
        (asked(context="\u200b"), Cut(), r"question 'q': the context has no tokens"),
        (asked("\u200b", context="a\u200bb"), Cut(), r"question 'q': no token covers the answer"),
    ],
)
def test_questions_that_cannot_be_cut_are_named(wordpiece, question: Question, cut: Cut, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Windows([question], wordpiece, cut, name="train")


def test_a_tokenizer_without_a_token_in_front_is_refused() -> None:
    with pytest.raises(DataError, match="puts no special token first"):
        Windows([asked("1950")], tokenizer.train(TEXTS, 300))


def test_no_questions_and_no_size_are_refused(wordpiece) -> None:
    with pytest.raises(DataError, match="contains no questions"):
        Windows([], wordpiece)
    with pytest.raises(ConfigError, match="stride must be at least 1"):
        Cut(stride=0)
