"""Inflection of German words: determiners, adjective endings, nouns, verbs and numerals, by rule and table.

Legend: slot is the gender of a singular, or "plural". Adjective endings depend on the determiner: weak after der-words,
mixed after ein-words, strong without a determiner.
"""

from dataclasses import dataclass
from typing import Literal

from fm_jax.core.errors import DataError

Gender = Literal["masculine", "feminine", "neuter"]
Slot = Literal["masculine", "feminine", "neuter", "plural"]
Case = Literal["nominative", "accusative", "dative"]
Person = Literal["ich", "du", "er", "wir", "sie"]  # er: third person singular; sie: third person plural
CASES: tuple[Case, ...] = ("nominative", "accusative", "dative")

Endings = dict[str, tuple[str, str, str]]  # slot -> the ending in each of CASES
_DEFINITE: Endings = {
    "masculine": ("der", "den", "dem"),
    "feminine": ("die", "die", "der"),
    "neuter": ("das", "das", "dem"),
    "plural": ("die", "die", "den"),
}
_DER: Endings = {  # dieser, jeder, welcher
    "masculine": ("er", "en", "em"),
    "feminine": ("e", "e", "er"),
    "neuter": ("es", "es", "em"),
    "plural": ("e", "e", "en"),
}
_EIN: Endings = {  # ein, kein and the possessives
    "masculine": ("", "en", "em"),
    "feminine": ("e", "e", "er"),
    "neuter": ("", "", "em"),
    "plural": ("e", "e", "en"),
}
_WEAK: Endings = {
    "masculine": ("e", "en", "en"),
    "feminine": ("e", "e", "en"),
    "neuter": ("e", "e", "en"),
    "plural": ("en", "en", "en"),
}
_MIXED: Endings = {
    "masculine": ("er", "en", "en"),
    "feminine": ("e", "e", "en"),
    "neuter": ("es", "es", "en"),
    "plural": ("en", "en", "en"),
}
_STRONG: Endings = {
    "masculine": ("er", "en", "em"),
    "feminine": ("e", "e", "er"),
    "neuter": ("es", "es", "em"),
    "plural": ("e", "e", "en"),
}
_EIN_WORDS = ("ein", "kein", "mein", "dein", "unser")
_UNITS = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn".split()
_TENS = ("", "zehn", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")


@dataclass(frozen=True)
class Noun:
    """A German noun with gender, singular and plural, and the English noun that it translates."""

    english: str
    english_plural: str
    gender: Gender
    singular: str
    plural: str

    def form(self, slot: Slot, case: Case) -> str:
        """Return the noun's form: only the dative plural differs, by an -n, unless the plural ends in -n or -s."""
        if slot != "plural":
            return self.singular
        return self.plural + "n" if case == "dative" and self.plural[-1] not in "ns" else self.plural


@dataclass(frozen=True)
class Verb:
    """A German verb's present tense, and the English verb that it translates; separable prefixes are stored apart."""

    english: str
    english_third: str
    prefix: str
    plural: str  # wir and sie; without the prefix
    ich: str
    du: str
    er: str

    @property
    def infinitive(self) -> str:
        """The infinitive, which equals the plural form for all verbs except sein."""
        return self.prefix + self.plural

    def finite(self, person: Person) -> str:
        """Return the conjugated form without its prefix."""
        return {"ich": self.ich, "du": self.du, "er": self.er}.get(person, self.plural)


def determiner(word: str, slot: Slot, case: Case) -> str:
    """Inflect "der", "dieser", an ein-word given by its stem, or "" (no determiner).

    Raises:
        DataError: another word, or the plural of ein.
    """
    at = CASES.index(case)
    if word == "":
        return ""
    if word == "der":
        return _DEFINITE[slot][at]
    if word == "dieser":
        return "dies" + _DER[slot][at]
    if word not in _EIN_WORDS or (word == "ein" and slot == "plural"):
        raise DataError(f"the determiner {word!r} has no {slot}")
    return word + _EIN[slot][at]


def adjective(word: str, determiner: str, slot: Slot, case: Case) -> str:
    """Inflect an attributive adjective; its ending depends on the determiner."""
    endings = _STRONG if determiner == "" else _MIXED if determiner in _EIN_WORDS else _WEAK
    stem = word[:-2] + word[-1] if word.endswith(("uer", "kel")) else word.removesuffix("e")  # teuer: teure
    return stem + endings[slot][CASES.index(case)]


def numeral(number: int) -> str:
    """Return a number from 2 to 9,999 as one German word: 347 is dreihundertsiebenundvierzig.

    Raises:
        DataError: a number out of range, or one that ends in 01, which German inflects before a noun.
    """
    if not 2 <= number <= 9_999 or number % 100 == 1:
        raise DataError(f"numerals must be 2 to 9999 and not end in 01, not {number}")
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    word = f"{_UNITS[thousands]}tausend" if thousands else ""
    word += f"{_UNITS[hundreds]}hundert" if hundreds else ""
    return word + (_below_hundred(rest) if rest else "")


def _below_hundred(number: int) -> str:
    """Return 2 to 99: units come before tens."""
    tens, units = divmod(number, 10)
    if number < len(_UNITS):
        return _UNITS[number]
    if tens == 1:
        return {6: "sech", 7: "sieb"}.get(units, _UNITS[units]) + "zehn"
    return f"{_UNITS[units]}und{_TENS[tens]}" if units else _TENS[tens]
