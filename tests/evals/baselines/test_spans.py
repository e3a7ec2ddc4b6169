import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.text.squad import Question, Span
from fm_jax.evals.baselines import spans

CONTEXT = "Ann lives in Rome. Ben, a cook, has a flat in La Paz! Nobody knows why"


def asked(text, answer, same_type=()):
    spans = tuple(Span(x, CONTEXT.index(x)) for x in same_type)
    return Question(text, text, CONTEXT, (Span(answer, CONTEXT.index(answer)),) if answer else (), same_type=spans)


def test_the_first_span_alike_is_the_one_that_stands_first():
    questions = [asked("a", "La Paz", ("La Paz", "Rome")), asked("b", "Rome", ("Rome",)), asked("c", "")]
    assert spans.first_same_type(questions) == {"a": "Rome", "b": "Rome", "c": ""}
    with pytest.raises(DataError, match="'d' has no 'same_type' spans"):
        spans.first_same_type([asked("d", "Rome")])


def test_random_spans_have_the_answers_number_of_words_and_reach_every_place():
    questions = [Question(str(n), "?", CONTEXT, (Span("La Paz", 46),)) for n in range(400)]
    found = spans.random_span([*questions, asked("none", "")], seed=0)
    words = CONTEXT.split()
    assert set(found.values()) == {" ".join(words[i : i + 2]) for i in range(len(words) - 1)} | {""}
    assert found["none"] == ""
    assert spans.random_span(questions, seed=0) != spans.random_span(questions, seed=1)


def test_an_answer_of_the_whole_context_is_the_only_one_of_its_length():
    whole = Question("w", "?", CONTEXT, (Span(CONTEXT, 0),))
    assert spans.random_span([whole], seed=3) == {"w": CONTEXT}


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("Where does Ben have a flat?", "Ben, a cook, has a flat in La Paz!"),
        ("Who lives in Rome?", "Ann lives in Rome."),
        ("What is known by nobody?", "Nobody knows why"),
        ("Was?", "Ann lives in Rome."),
    ],
)
def test_the_nearest_sentence_shares_most_words(question, sentence):
    assert spans.nearest_sentence([asked(question, "Rome")])[question] == sentence
