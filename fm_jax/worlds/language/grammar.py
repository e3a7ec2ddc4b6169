"""Two grammars for one derivation: English, and German that is correct by rule.

A sentence consists of `Clause`s of `Phrase`s. The German has gender × case, adjective endings, plurals, agreement,
verb-second and verb-final order, separable verbs, clause-final infinitives, and numerals with units before tens. None
of these can be translated word by word.
"""

from dataclasses import dataclass
from typing import Literal

from fm_jax.core.errors import DataError
from fm_jax.worlds.language import german, lexicon
from fm_jax.worlds.language.german import CASES, Case, Noun, Person, Slot, Verb
from fm_jax.worlds.language.lexicon import Adjective, Preposition, Pronoun

PHENOMENA = (
    *(f"{gender} {case}" for gender in ("masculine", "feminine", "neuter") for case in CASES),
    "indefinite article",
    "possessive or kein",
    "adjective ending",
    "plural",
    "dative plural",
    "numeral",
    "unit-ten inversion",
    "conjugation",
    "object pronoun",
    "verb second",
    "verb final",
    "separable verb",
    "modal and infinitive",
    "negation",
)
_ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_ENGLISH_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: "the old dog", "three old dogs", "old dogs"."""

    noun: Noun
    determiner: str = ""  # English, a key of lexicon.DETERMINERS; "" before bare plurals and numerals
    adjective: Adjective | None = None
    plural: bool = False
    count: int = 0  # a numeral; 0: none

    def __post_init__(self) -> None:
        if (self.count or not self.determiner) and not self.plural:
            raise DataError(f"a singular {self.noun.english!r} needs a determiner and cannot have a numeral")
        if self.count and self.determiner:
            raise DataError(f"{self.noun.english!r} can have a determiner or a numeral, not both")

    @property
    def slot(self) -> Slot:
        """The gender, or "plural": German determiners and adjectives agree with it."""
        return "plural" if self.plural else self.noun.gender

    @property
    def person(self) -> Person:
        """The person that German verbs agree with."""
        return "sie" if self.plural else "er"

    @property
    def third(self) -> bool:
        """Whether English verbs take their -s after it."""
        return not self.plural


Argument = Phrase | Pronoun


@dataclass(frozen=True)
class Clause:
    """A subject and a verb with its objects in German order, or "to be" with a `predicate`."""

    subject: Argument
    verb: Verb
    objects: tuple[tuple[Argument, Case], ...] = ()
    place: tuple[Preposition, Phrase] | None = None
    predicate: Adjective | None = None
    modal: Verb | None = None
    negated: bool = False


@dataclass(frozen=True)
class Sentence:
    """An English source, its German target, and their phenomena: a subset of PHENOMENA, in that order."""

    source: str
    target: str
    phenomena: tuple[str, ...]


def plain(clause: Clause) -> Sentence:
    """Build a main clause: the verb is the second constituent, after the subject."""
    return _sentence(english(clause), spoken(clause, "main"), clause)


def fronted(adverb: str, clause: Clause) -> Sentence:
    """Build a clause after an adverb: the verb stays second, so the subject follows it."""
    target = f"{lexicon.ADVERBS[adverb]} {spoken(clause, 'inverted')}"
    return _sentence(f"{adverb} {english(clause)}", target, clause, extra=("verb second",))


def that(matrix: Clause, clause: Clause) -> Sentence:
    """Build "… that …": the verb of the second clause is at its end."""
    target = f"{spoken(matrix, 'main')}, dass {spoken(clause, 'final')}"
    return _sentence(f"{english(matrix)} that {english(clause)}", target, matrix, clause, extra=("verb final",))


def because(clause: Clause, reason: Clause) -> Sentence:
    """Build "… because …": the verb of the second clause is at its end."""
    target = f"{spoken(clause, 'main')}, weil {spoken(reason, 'final')}"
    return _sentence(f"{english(clause)} because {english(reason)}", target, clause, reason, extra=("verb final",))


def condition(premise: Clause, clause: Clause) -> Sentence:
    """Build "if …, …": the first clause is the first constituent, so the second clause begins with its verb."""
    target = f"wenn {spoken(premise, 'final')}, {spoken(clause, 'inverted')}"
    orders = ("verb final", "verb second")
    return _sentence(f"if {english(premise)}, {english(clause)}", target, premise, clause, extra=orders)


def english(clause: Clause) -> str:
    """Return a clause in English, without capital and full stop."""
    subject, verb = clause.subject, clause.verb
    third = subject.third
    who = subject.english if isinstance(subject, Pronoun) else _english_phrase(subject)
    if verb is lexicon.BE:
        does = "am" if who == "I" else verb.english_third if third else verb.english
        does += " not" if clause.negated else ""
    elif clause.modal:
        modal = clause.modal
        does = f"{modal.english_third if third else modal.english} {verb.english}"
    elif clause.negated:
        does = f"{'does' if third else 'do'} not {verb.english}"
    else:
        does = verb.english_third if third else verb.english
    words = [who, does]
    words += [noun.english_object if isinstance(noun, Pronoun) else _english_phrase(noun) for noun, _ in clause.objects]
    if clause.place:
        words += [clause.place[0].english, _english_phrase(clause.place[1])]
    if clause.predicate:
        words.append(clause.predicate.english)
    return " ".join(words)


def spoken(clause: Clause, order: Literal["main", "inverted", "final"]) -> str:
    """Return a clause in German with its verb in second place, before its subject, or at its end."""
    subject, verb, modal = clause.subject, clause.verb, clause.modal
    who, person = _german(subject, "nominative"), subject.person
    # the verbal bracket: the finite verb on the left (last in a subordinate clause), the rest on the right
    finite, rest = (modal.finite(person), verb.infinitive) if modal else (verb.finite(person), verb.prefix)
    middle = [_german(noun, case) for noun, case in clause.objects]
    middle += ["nicht"] if clause.negated else []
    if clause.place:
        preposition, phrase = clause.place
        middle += [preposition.german, _german(phrase, preposition.case)]
    middle += [clause.predicate.german] if clause.predicate else []
    if order == "final":
        words = [who, *middle, *([rest, finite] if modal else [rest + finite])]
    else:
        words = [*([who, finite] if order == "main" else [finite, who]), *middle, rest]
    return " ".join(word for word in words if word)


def english_numeral(number: int) -> str:
    """Return a number from 1 to 9,999 in English words: three hundred forty-seven."""
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    words = [f"{_ENGLISH[thousands]} thousand"] if thousands else []
    words += [f"{_ENGLISH[hundreds]} hundred"] if hundreds else []
    if rest >= len(_ENGLISH):
        tens, units = divmod(rest, 10)
        words.append(_ENGLISH_TENS[tens] + (f"-{_ENGLISH[units]}" if units else ""))
    elif rest:
        words.append(_ENGLISH[rest])
    return " ".join(words)


def _english_phrase(phrase: Phrase) -> str:
    word = english_numeral(phrase.count) if phrase.count else phrase.determiner
    rest = f"{phrase.adjective.english} " if phrase.adjective else ""
    rest += phrase.noun.english_plural if phrase.plural else phrase.noun.english
    if word == "a" and rest[0] in "aeiou":
        word = "an"
    if word == "this" and phrase.plural:
        word = "these"
    return f"{word} {rest}".strip()


def _german(phrase: Argument, case: Case) -> str:
    """Return a pronoun or a noun phrase in a case."""
    if isinstance(phrase, Pronoun):
        return phrase.german[CASES.index(case)]
    stem = lexicon.DETERMINERS[phrase.determiner] if phrase.determiner else ""
    words = [german.numeral(phrase.count) if phrase.count else german.determiner(stem, phrase.slot, case)]
    if phrase.adjective:
        words.append(german.adjective(phrase.adjective.german, stem, phrase.slot, case))
    return " ".join(word for word in (*words, phrase.noun.form(phrase.slot, case)) if word)


def _sentence(source: str, target: str, *clauses: Clause, extra: tuple[str, ...] = ()) -> Sentence:
    traits = {*extra}.union(*(_traits(clause) for clause in clauses))
    written = [f"{text[0].upper()}{text[1:]}." for text in (source, target)]
    return Sentence(written[0], written[1], tuple(name for name in PHENOMENA if name in traits))


def _traits(clause: Clause) -> set[str]:
    """Return the phenomena of one clause."""
    arguments: list[tuple[Argument, Case]] = [(clause.subject, "nominative"), *clause.objects]
    if clause.place:
        arguments.append((clause.place[1], clause.place[0].case))
    present = {
        "conjugation": isinstance(clause.subject, Pronoun),
        "object pronoun": any(isinstance(noun, Pronoun) for noun, _ in clause.objects),
        "separable verb": bool(clause.verb.prefix),
        "modal and infinitive": clause.modal is not None,
        "negation": clause.negated,
    }
    for argument, case in arguments:
        if isinstance(argument, Phrase):
            present |= dict.fromkeys(_phrase_traits(argument, case), True)
    return {name for name, has in present.items() if has}


def _phrase_traits(phrase: Phrase, case: Case) -> set[str]:
    present = {
        f"{phrase.slot} {case}": not phrase.plural,
        "indefinite article": phrase.determiner == "a",
        "possessive or kein": phrase.determiner in ("my", "your", "our", "no"),
        "adjective ending": phrase.adjective is not None,
        "plural": phrase.plural,
        "dative plural": phrase.plural and case == "dative",
        "numeral": phrase.count > 0,
        "unit-ten inversion": phrase.count % 100 > 20 and phrase.count % 10 > 0,
    }
    return {name for name, has in present.items() if has}
