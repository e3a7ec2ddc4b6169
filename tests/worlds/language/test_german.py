"""Forms against grammar tables written out by hand."""

import pytest

from fm_jax.core.errors import DataError
from fm_jax.worlds.language import german, lexicon
from fm_jax.worlds.language.german import CASES

# determiner -> slot -> determiner and adjective "alt" in the nominative, accusative and dative
PHRASES = {
    "der": {
        "masculine": "der alte, den alten, dem alten",
        "feminine": "die alte, die alte, der alten",
        "neuter": "das alte, das alte, dem alten",
        "plural": "die alten, die alten, den alten",
    },
    "dieser": {
        "masculine": "dieser alte, diesen alten, diesem alten",
        "feminine": "diese alte, diese alte, dieser alten",
        "neuter": "dieses alte, dieses alte, diesem alten",
        "plural": "diese alten, diese alten, diesen alten",
    },
    "ein": {
        "masculine": "ein alter, einen alten, einem alten",
        "feminine": "eine alte, eine alte, einer alten",
        "neuter": "ein altes, ein altes, einem alten",
    },
    "unser": {
        "masculine": "unser alter, unseren alten, unserem alten",
        "feminine": "unsere alte, unsere alte, unserer alten",
        "neuter": "unser altes, unser altes, unserem alten",
        "plural": "unsere alten, unsere alten, unseren alten",
    },
    "": {"plural": "alte, alte, alten"},
}
ROWS = [(word, slot, forms) for word, slots in PHRASES.items() for slot, forms in slots.items()]


@pytest.mark.parametrize(("word", "slot", "forms"), ROWS)
def test_determiner_and_adjective_agree_in_gender_number_and_case(word: str, slot: str, forms: str) -> None:
    for case, wanted in zip(CASES, forms.split(", "), strict=True):
        found = f"{german.determiner(word, slot, case)} {german.adjective('alt', word, slot, case)}"
        assert found.strip() == wanted


def test_adjectives_lose_the_e_that_would_double() -> None:
    assert german.adjective("müde", "ein", "masculine", "nominative") == "müder"
    assert german.adjective("teuer", "der", "feminine", "nominative") == "teure"
    assert german.adjective("schwer", "der", "feminine", "nominative") == "schwere"


def test_the_dative_plural_takes_an_n_unless_it_has_one_or_ends_in_s() -> None:
    plurals = {"dog": "Hunden", "woman": "Frauen", "girl": "Mädchen", "car": "Autos", "bird": "Vögeln", "egg": "Eiern"}
    for english, wanted in plurals.items():
        assert lexicon.NOUNS[english].form("plural", "dative") == wanted
    assert lexicon.NOUNS["dog"].form("plural", "accusative") == "Hunde"
    assert lexicon.NOUNS["dog"].form("masculine", "dative") == "Hund"


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (2, "zwei"),
        (12, "zwölf"),
        (16, "sechzehn"),
        (17, "siebzehn"),
        (20, "zwanzig"),
        (21, "einundzwanzig"),
        (30, "dreißig"),
        (47, "siebenundvierzig"),
        (66, "sechsundsechzig"),
        (77, "siebenundsiebzig"),
        (100, "einhundert"),
        (116, "einhundertsechzehn"),
        (347, "dreihundertsiebenundvierzig"),
        (1000, "eintausend"),
        (1100, "eintausendeinhundert"),
        (6016, "sechstausendsechzehn"),
        (9999, "neuntausendneunhundertneunundneunzig"),
    ],
)
def test_numerals_put_units_before_tens(number: int, word: str) -> None:
    assert german.numeral(number) == word


def test_all_numerals_differ() -> None:
    numbers = [number for number in range(2, 10_000) if number % 100 != 1]
    assert len({german.numeral(number) for number in numbers}) == len(numbers)


@pytest.mark.parametrize("number", [0, 1, 101, 10_000])
def test_numerals_that_would_need_an_ending_are_refused(number: int) -> None:
    with pytest.raises(DataError, match=str(number)):
        german.numeral(number)


def test_there_is_no_plural_of_ein() -> None:
    with pytest.raises(DataError, match="the determiner 'ein' has no plural"):
        german.determiner("ein", "plural", "dative")


def test_regular_verbs_keep_their_stem_in_all_persons() -> None:
    """A check of the table: forms that are not by rule are the known irregular ones."""
    irregular = set()
    for table in (lexicon.ACCUSATIVE, lexicon.DATIVE, lexicon.GIVING, lexicon.ALONE):
        for verb, _ in table.values():
            stem = verb.plural.removesuffix("en")
            link = "e" if stem[-1] in "td" or stem.endswith("chn") else ""
            du = "t" if stem[-1] in "sßz" else f"{link}st"
            if (verb.ich, verb.du, verb.er) != (f"{stem}e", f"{stem}{du}", f"{stem}{link}t"):
                irregular.add(verb.infinitive)
    assert irregular == {"sehen", "tragen", "nehmen", "haben", "einladen", "helfen", "geben", "schlafen"}
