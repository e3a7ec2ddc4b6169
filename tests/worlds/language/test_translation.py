"""Every phenomenon on sentences translated by hand, and what the draw promises."""

import random
import re

import pytest

from fm_jax.core.errors import DataError
from fm_jax.worlds.language import grammar, lexicon, translation
from fm_jax.worlds.language.grammar import Clause, Phrase, because, condition, fronted, plain, that
from fm_jax.worlds.language.lexicon import (
    ACCUSATIVE,
    ADJECTIVES,
    ALONE,
    BE,
    DATIVE,
    GIVING,
    MATRIX,
    MODALS,
    NOUNS,
    PREPOSITIONS,
)


def a(text: str, *, count: int = 0) -> grammar.Argument:
    """Read "the old dog", "old dogs" or a pronoun."""
    if text in lexicon.PRONOUNS:
        return lexicon.PRONOUNS[text]
    words = text.split()
    word = words.pop(0) if words[0] in lexicon.DETERMINERS else ""
    described = ADJECTIVES[words.pop(0)] if words[0] in ADJECTIVES else None
    noun = NOUNS.get(words[0]) or next(noun for noun in NOUNS.values() if noun.english_plural == words[0])
    return Phrase(noun, word, described, words[0] != noun.english, count)


def does(subject: str, verb: str, *objects: str, at: str = "", modal: str = "", negated: bool = False) -> Clause:
    """Make a clause; a recipient comes before what is given."""
    if verb in GIVING:
        found = tuple(zip(map(a, objects), ("dative", "accusative"), strict=True))
    else:
        found = tuple((a(one), "dative" if verb in DATIVE else "accusative") for one in objects)
    verbs = {**ACCUSATIVE, **DATIVE, **GIVING, **ALONE}
    place = None
    if at:
        name = next(name for name in PREPOSITIONS if at.startswith(name + " "))
        place = PREPOSITIONS[name], a(at.removeprefix(name + " "))
    return Clause(a(subject), verbs[verb][0], found, place, modal=MODALS.get(modal), negated=negated)


def be(subject: str, adjective: str, *, negated: bool = False) -> Clause:
    return Clause(a(subject), BE, predicate=ADJECTIVES[adjective], negated=negated)


def counted(number: int, noun: str, verb: str, object_: str) -> Clause:
    return Clause(a(noun, count=number), ACCUSATIVE[verb][0], ((a(object_), "accusative"),))


SENTENCES = {
    "gender in the nominative and the accusative": (
        plain(does("the man", "see", "the apple")),
        "The man sees the apple.",
        "Der Mann sieht den Apfel.",
    ),
    "feminine and neuter, where both cases look alike": (
        plain(does("the woman", "see", "the child")),
        "The woman sees the child.",
        "Die Frau sieht das Kind.",
    ),
    "a masculine and a feminine dative, two objects": (
        plain(does("the queen", "give", "the dog", "the flower")),
        "The queen gives the dog the flower.",
        "Die Königin gibt dem Hund die Blume.",
    ),
    "a verb that governs the dative in German only": (
        plain(does("this friend", "help", "a woman")),
        "This friend helps a woman.",
        "Dieser Freund hilft einer Frau.",
    ),
    "indefinite articles, adjectives, and an before a vowel": (
        plain(does("a small child", "buy", "a old clock")),
        "A small child buys an old clock.",
        "Ein kleines Kind kauft eine alte Uhr.",
    ),
    "weak and mixed endings": (
        plain(does("the old man", "see", "my tired dog")),
        "The old man sees my tired dog.",
        "Der alte Mann sieht meinen müden Hund.",
    ),
    "kein and strong endings": (
        plain(does("tired birds", "need", "no expensive car")),
        "Tired birds need no expensive car.",
        "Müde Vögel brauchen kein teures Auto.",
    ),
    "plurals, these, and a dative plural after a preposition": (
        plain(does("this girls", "dance", at="with the small dogs")),
        "These girls dance with the small dogs.",
        "Diese Mädchen tanzen mit den kleinen Hunden.",
    ),
    "prepositions that govern the accusative": (
        plain(does("we", "work", at="for the king")),
        "We work for the king.",
        "Wir arbeiten für den König.",
    ),
    "a place in the dative": (
        plain(does("you", "sleep", at="next to our house")),
        "You sleep next to our house.",
        "Du schläfst neben unserem Haus.",
    ),
    "an object pronoun in the accusative": (
        plain(does("she", "know", "he")),
        "She knows him.",
        "Sie kennt ihn.",
    ),
    "an object pronoun in the dative": (
        plain(does("they", "thank", "she")),
        "They thank her.",
        "Sie danken ihr.",
    ),
    "the verb second after an adverb": (
        fronted("today", does("the man", "see", "the dog")),
        "Today the man sees the dog.",
        "Heute sieht der Mann den Hund.",
    ),
    "the verb last after dass": (
        that(Clause(a("I"), MATRIX["know"]), does("the man", "see", "the dog")),
        "I know that the man sees the dog.",
        "Ich weiß, dass der Mann den Hund sieht.",
    ),
    "the verb last after weil": (
        because(does("you", "laugh"), be("the cat", "happy")),
        "You laugh because the cat is happy.",
        "Du lachst, weil die Katze glücklich ist.",
    ),
    "a clause in first place": (
        condition(does("he", "sing"), does("my aunts", "wait")),
        "If he sings, my aunts wait.",
        "Wenn er singt, warten meine Tanten.",
    ),
    "a prefix at the end": (
        plain(does("the doctor", "open", "the door")),
        "The doctor opens the door.",
        "Der Arzt macht die Tür auf.",
    ),
    "a prefix that rejoins its verb at the end": (
        that(Clause(a("they"), MATRIX["say"]), does("I", "turn on", "a lamp")),
        "They say that I turn on a lamp.",
        "Sie sagen, dass ich eine Lampe einschalte.",
    ),
    "a modal and an infinitive": (
        plain(does("he", "buy", "the bag", modal="want to")),
        "He wants to buy the bag.",
        "Er will die Tasche kaufen.",
    ),
    "a modal after the infinitive in a dass clause": (
        that(Clause(a("we"), MATRIX["hope"]), does("you", "call", "the uncle", modal="can")),
        "We hope that you can call the uncle.",
        "Wir hoffen, dass du den Onkel anrufen kannst.",
    ),
    "the future after an adverb": (
        fronted("tomorrow", does("the brothers", "arrive", at="without your daughter", modal="will")),
        "Tomorrow the brothers will arrive without your daughter.",
        "Morgen werden die Brüder ohne deine Tochter ankommen.",
    ),
    "nicht after the object and before a prefix": (
        plain(does("the girl", "close", "the window", negated=True)),
        "The girl does not close the window.",
        "Das Mädchen macht das Fenster nicht zu.",
    ),
    "nicht before a place": (
        plain(does("they", "sleep", at="under the table", negated=True)),
        "They do not sleep under the table.",
        "Sie schlafen nicht unter dem Tisch.",
    ),
    "a predicate adjective, which has no ending": (
        plain(be("I", "tired", negated=True)),
        "I am not tired.",
        "Ich bin nicht müde.",
    ),
    "a numeral with strong endings": (
        plain(counted(47, "old men", "see", "the house")),
        "Forty-seven old men see the house.",
        "Siebenundvierzig alte Männer sehen das Haus.",
    ),
    "a large numeral": (
        plain(counted(4_321, "horses", "carry", "the letters")),
        "Four thousand three hundred twenty-one horses carry the letters.",
        "Viertausenddreihunderteinundzwanzig Pferde tragen die Briefe.",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_grammar_says_what_a_person_would(name: str) -> None:
    found, source, target = SENTENCES[name]
    assert (found.source, found.target) == (source, target)


@pytest.mark.parametrize(
    ("sentence", "labels"),
    [
        (
            "a masculine and a feminine dative, two objects",
            "feminine nominative, feminine accusative, masculine dative",
        ),
        ("weak and mixed endings", "masculine nominative, masculine accusative, possessive or kein, adjective ending"),
        ("an object pronoun in the dative", "conjugation, object pronoun"),
        ("a clause in first place", "possessive or kein, plural, conjugation, verb second, verb final"),
        ("plurals, these, and a dative plural after a preposition", "adjective ending, plural, dative plural"),
        ("a prefix that rejoins its verb at the end", "feminine accusative, indefinite article, conjugation, "
         "verb final, separable verb"),
        ("a modal and an infinitive", "feminine accusative, conjugation, modal and infinitive"),
        ("nicht before a place", "masculine dative, conjugation, negation"),
        ("a large numeral", "plural, numeral, unit-ten inversion"),
    ],
)  # fmt: skip
def test_a_sentence_is_labelled_with_its_phenomena(sentence: str, labels: str) -> None:
    found = SENTENCES[sentence][0].phenomena
    assert sorted(found) == sorted(labels.split(", "))
    assert list(found) == [name for name in translation.PHENOMENA if name in found]


def test_the_hand_made_sentences_and_the_draw_cover_every_phenomenon() -> None:
    for found in ([one for one, _, _ in SENTENCES.values()], translation.sentences("test", 400)):
        assert {name for sentence in found for name in sentence.phenomena} == set(translation.PHENOMENA)


@pytest.mark.parametrize(
    ("number", "words"),
    [(8, "eight"), (15, "fifteen"), (40, "forty"), (99, "ninety-nine"), (710, "seven hundred ten"),
     (3_012, "three thousand twelve")],
)  # fmt: skip
def test_english_numerals(number: int, words: str) -> None:
    assert grammar.english_numeral(number) == words


def test_the_same_seed_gives_the_same_sentences_and_a_larger_draw_begins_with_the_smaller() -> None:
    few, many = translation.sentences("validation", 20), translation.sentences("validation", 60)
    assert few == many[:20] and len({one.target for one in many}) == 60
    assert few != translation.sentences("validation", 20, seed=1)


def test_splits_share_no_sentence_in_either_language_whatever_the_seed() -> None:
    drawn = {split: translation.sentences(split, 1500, seed=seed) for seed, split in enumerate(translation.SPLITS)}
    for side in ("source", "target"):
        texts = {split: {getattr(one, side) for one in found} for split, found in drawn.items()}
        assert not texts["test"] & (texts["train"] | texts["validation"]) and not texts["train"] & texts["validation"]


def test_english_has_one_german() -> None:
    rng, german = random.Random(0), dict[str, str]()
    for _ in range(20_000):
        one = translation.draw(rng, 30)
        assert german.setdefault(one.source, one.target) == one.target


def test_the_vocabulary_is_small_and_every_word_of_it_occurs() -> None:
    drawn = translation.sentences("train", 12_000)
    words = {side: {word for one in drawn for word in re.findall(r"\w+", getattr(one, side).lower())}
             for side in ("source", "target")}  # fmt: skip
    compound = re.compile("hundert|tausend|und.*zig|unddreißig")
    simple = {word for word in words["target"] if not compound.search(word)}
    assert 200 <= len(words["source"]) <= 320 and 300 <= len(simple) <= 460, (len(words["source"]), len(simple))
    for noun in NOUNS.values():
        assert {noun.english, noun.english_plural} <= words["source"]
        assert {noun.singular.lower(), noun.plural.lower()} <= words["target"]


def test_small_numerals_can_be_asked_for() -> None:
    drawn = translation.sentences("train", 2_000, largest=12)
    assert not any("undzwanzig" in one.target or "hundert" in one.target for one in drawn)
    assert not any("unit-ten inversion" in one.phenomena for one in drawn)


def test_what_cannot_be_drawn_is_refused() -> None:
    for split, count, largest in (("dev", 3, 9), ("test", 0, 9), ("test", 3, 10_000)):
        with pytest.raises(DataError, match="largest 2 to 9999"):
            translation.sentences(split, count, largest=largest)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="determiner"):
        Phrase(NOUNS["dog"])
    with pytest.raises(DataError, match="not both"):
        Phrase(NOUNS["dog"], "the", plural=True, count=3)
