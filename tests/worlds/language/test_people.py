"""The generated paragraphs: what is said of a question is true, and the test split shares no word with the others."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.worlds.language import people
from fm_jax.worlds.language.people import ANIMALS, ENDINGS, FIRST, LAST, SPLITS, YEARS
from fm_jax.worlds.language.relations import RELATIONS

SMALL = people.Config(train=300, validation=40, test=80)


def questions(split, cfg=SMALL):
    (article,) = people.generate(cfg, split)["data"]
    return [(paragraph["context"], qa) for paragraph in article["paragraphs"] for qa in paragraph["qas"]]


def test_every_answer_and_every_span_alike_stands_where_it_says():
    for split in SPLITS:
        for context, qa in questions(split):
            for span in (*qa["answers"], *qa["same_type"]):
                assert context[span["answer_start"] :].startswith(span["text"])
            assert qa["answers"][0] in qa["same_type"]
            assert [span["answer_start"] for span in qa["same_type"]] == sorted(
                s["answer_start"] for s in qa["same_type"]
            )


def test_kinds_are_told_by_how_many_spans_could_answer():
    for _, qa in questions("train"):
        assert (len(qa["same_type"]) == 1) == (qa["kind"] == "type")
    counts = Counter(qa["kind"] for _, qa in questions("train"))
    assert counts.keys() == {"type", "relation", "binding"} and min(counts.values()) > 50


def matches(form, asked):
    before, _, after = form.partition("{n}")
    return asked.startswith(before) and asked.endswith(after)


def relation(asked):
    """The relation that a question asks for, by its wording around the name."""
    (found,) = {name for name, one in RELATIONS.items() for form in one.asked if matches(form, asked)}
    return found


def test_a_binding_question_has_rivals_in_its_relation_and_its_person_decides():
    by_paragraph: dict[str, list] = {}
    for context, qa in questions("train"):
        by_paragraph.setdefault(context, []).append(qa)
    pairs = 0
    for asked in by_paragraph.values():
        binding = [qa for qa in asked if qa["kind"] == "binding"]
        if len(binding) == 2:
            pairs += 1
            assert relation(binding[0]["question"]) == relation(binding[1]["question"])
            assert binding[0]["answers"] != binding[1]["answers"]
    assert pairs > 50


def test_a_question_names_a_person_of_its_paragraph():
    for context, qa in questions("train"):
        shape = next(form for one in RELATIONS.values() for form in one.asked if matches(form, qa["question"]))
        before, _, after = shape.partition("{n}")
        assert qa["question"].removeprefix(before).removesuffix(after).split()[0] in context


def test_no_name_city_job_animal_instrument_or_year_of_the_test_split_occurs_in_another():
    texts = {split: " ".join(context for context, _ in questions(split)) for split in SPLITS}
    tokens = {split: set(text.replace(",", " ").replace(".", " ").split()) for split, text in texts.items()}
    for words in (FIRST, LAST, YEARS, ANIMALS):
        assert not tokens["test"] & set(words) & (tokens["train"] | tokens["validation"])
        assert tokens["test"] & set(words)
    made_up = {split: {w for _, qa in questions(split) for w in invented(qa)} for split in SPLITS}
    assert len(made_up["test"]) > 50
    assert not made_up["test"] & (tokens["train"] | tokens["validation"])


def invented(qa):
    """Yield the made-up word of a question's answer, if it is a city, a job or an instrument."""
    for span in qa["answers"]:
        *_, last = span["text"].split()
        if last not in YEARS and last not in ANIMALS:
            yield last


def test_made_up_words_have_many_letters_and_seldom_repeat_and_their_endings_say_what_they_are():
    words = [word for _, qa in questions("train") for word in invented(qa)]
    assert len(set(words)) > 0.8 * len(words)
    assert {"ö", "š", "ł", "é"} < set("".join(words))
    assert all(sum(word.endswith(ending) for mine in ENDINGS.values() for ending in mine) == 1 for word in words)
    assert any(qa["answers"][0]["text"].startswith("San ") for _, qa in questions("train"))


def test_the_word_lists_hold_no_word_twice():
    for words in (FIRST, LAST, ANIMALS, YEARS):
        assert len(set(words)) == len(words)
    assert not set(FIRST) & set(LAST)
    assert any(ord(letter) > 0x370 for name in FIRST for letter in name)


def test_some_questions_have_no_answer_where_that_is_asked_for():
    cfg = replace(SMALL, unanswerable=0.4)
    assert people.generate(cfg, "test")["version"] == "v2.0"
    found = [qa for _, qa in questions("train", cfg)]
    none = [qa for qa in found if qa["is_impossible"]]
    assert 0.3 < len(none) / len(found) < 0.5
    assert all(not qa["answers"] and qa["kind"] == "none" for qa in none)
    assert any(qa["same_type"] for qa in none) and any(not qa["same_type"] for qa in none)
    assert all(qa["answers"] for qa in found if not qa["is_impossible"])


def test_the_same_seed_writes_the_same_bytes_and_another_one_others(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        people.write(tmp_path / name, replace(SMALL, train=20, seed=seed))
    first, again, other = ((tmp_path / name / "train.json").read_bytes() for name in "abc")
    assert first == again != other
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"train.json", "validation.json", "test.json"}
    assert json.loads(first)["version"] == "1.1"


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"test": 0}, "test must have at least 1 paragraph"), ({"unanswerable": 1.0}, "below 1")],
)
def test_sizes_that_cannot_be_written_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        people.Config(**fields)
