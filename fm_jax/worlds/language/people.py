"""Paragraphs about people, with questions whose answers are known spans, written as SQuAD files.

Each question has a "kind", the skill that it needs:

    type      only one span of the paragraph has the answer's type: telling a city from a year is enough
    relation  several spans have that type, but only one is in the asked relation (lives in, was born in)
    binding   several people are in the asked relation, so the sentence about the right person must be found
    none      the paragraph has no answer (only with `unanswerable`)

Cities, jobs, instruments and half of the names are built from syllables, because real ones are so few that a small
model would memorise them; endings such as -burg and -smith show the type. No name, stem, animal or year of the test
split occurs in another split. Real names come from many languages and keep their letters. "same_type" lists, for each
question, every span of its answer's type.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.core.workdir import write_atomically
from fm_jax.worlds.language.relations import RELATIONS

SPLITS = ("train", "validation", "test")
FIRST = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karla Liam Maya Noah Olivia Peter Quinn Rosa Simon Tara "
    "Umar Vera Walter Yusuf Zoë Aïcha Björn Chloé Dörte Élodie François Göran Hélène Inês Jürgen Kübra Lucía Marçal "
    "Niño Øyvind Päivi Renée Søren Şebnem Tomás Ümit Vítor Wanda Żaneta Łukasz Čedomir Đorđe Ольга Иван Ελένη Νίκος"
).split()
LAST = (
    "Abel Baker Castro Dahl Evans Fischer Garcia Haas Ibsen Jansen Keller Lopez Meyer Novak Olsen Park Quist Rossi "
    "Sato Tanaka Urban Vogel Weber Xu Young Zeller Ångström Böhm Çelik Dvořák Eötvös Fabergé González Håkansson İnan "
    "Jørgensen Köhler Lübke Müller Nguyễn Öztürk Peña Řehák Świątek Škoda Touré Ünal Vásquez Wójcik Žižek Смирнов Папас"
).split()
ONSETS = "b br d dr f fl g gr h k kr l m n p pl r s š st t tr v w z ž".split()
VOWELS = "a e i o u á é ö ü ei".split()
ENDINGS = {
    "city": "burg grad ville holm ford stadt".split(),
    "job": "smith wright monger keeper weaver herd".split(),
    "instrument": "phone horn lute fiddle pipe drum".split(),
}
BEFORE = ("San", "New", "Bad", "Nový", "Upper")
CODAS = ["", "", "l", "m", "n", "r", "s", "t", "nd", "ł"]
COUNTS = "two three four five six seven eight nine".split()
COLOURS = "black white brown grey red yellow green spotted striped young old tame".split()
ANIMALS = (
    "bees budgies canaries cats chickens cows dogs donkeys doves ducks ferrets finches frogs geckos geese goats "
    "goldfish hamsters horses lizards llamas mice newts owls parrots pigs ponies rabbits rats sheep snails snakes "
    "spiders swans tortoises turkeys"
).split()
YEARS = [str(year) for year in range(1950, 2025)]
FILLER = (
    "The market opens early on Mondays.",
    "It rained for most of the week.",
    "Nobody could say why the clock had stopped.",
    "The letter was never answered.",
    "They all met at the station café.",
    "A long winter was expected.",
    "Such things are rarely written down.",
    "The rest of the story is well known.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the splits."""

    train: int = 2500  # paragraphs; each has up to three questions
    validation: int = 150
    test: int = 300
    unanswerable: float = 0.0  # share of questions without an answer; above 0 the files are v2.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that values are in range."""
        check_least(self, seed=0)
        for split in SPLITS:
            if getattr(self, split) < 1:
                raise ConfigError(f"{split} must have at least 1 paragraph, not {getattr(self, split)}")
        if not 0 <= self.unanswerable < 1:
            raise ConfigError(f"unanswerable must be at least 0 and below 1, not {self.unanswerable}")


def write(folder: Path, cfg: Config) -> None:
    """Write train.json, validation.json and test.json; the same config gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_atomically(folder / f"{split}.json", json.dumps(generate(cfg, split), ensure_ascii=False, indent=1))


def generate(cfg: Config, split: str) -> dict[str, Any]:
    """Return one split in SQuAD's format: {"version", "data": [{"title", "paragraphs": [{"context", "qas"}]}]}."""
    rng = np.random.default_rng((cfg.seed, SPLITS.index(split)))
    words = _Words(rng, held_out=split == "test")
    paragraphs = [
        _paragraph(rng, words, f"{split}-{number:05d}", cfg.unanswerable) for number in range(getattr(cfg, split))
    ]
    version = "v2.0" if cfg.unanswerable else "1.1"
    return {"version": version, "data": [{"title": "people", "paragraphs": paragraphs}]}


@dataclass(frozen=True)
class _Fact:
    """One fact of a paragraph: person, relation and value."""

    person: int
    relation: str
    value: str

    @property
    def type(self) -> str:
        return RELATIONS[self.relation].type


@dataclass
class _Text:
    """A paragraph under construction, and the start character of each fact's value."""

    text: str = ""
    at: dict[_Fact, int] = field(default_factory=dict)

    def add(self, template: str, name: str, facts: tuple[_Fact, ...]) -> None:
        """Append a sentence; {x0} and {x1} are replaced by the facts' values, {n} by the name."""
        self.text += " " if self.text else ""
        for part in _parts(template):
            if part.startswith("{x"):
                fact = facts[int(part[2:-1])]
                self.at[fact] = len(self.text)
                self.text += fact.value
            else:
                self.text += name if part == "{n}" else part


class _Words:
    """The words of the test split (a fifth of all, by checksum), or all others."""

    def __init__(self, rng: np.random.Generator, *, held_out: bool) -> None:
        self._rng, self._held_out = rng, held_out
        lists = {"first": FIRST, "last": LAST, "animal": ANIMALS, "year": YEARS}
        self._lists = {name: [word for word in words if self._mine(word)] for name, words in lists.items()}

    def names(self, which: str, count: int) -> list[str]:
        """Draw different first or last names, half of them invented."""
        names: dict[str, None] = {}
        while len(names) < count:
            real = self._rng.random() < 0.5
            names[_pick(self._rng, self._lists[which]) if real else self._stem(2).capitalize()] = None
        return list(names)

    def answer(self, kind: str) -> str:
        """Draw an answer of a type, one word or several."""
        if kind == "pets":
            return " ".join(_pick(self._rng, words) for words in (COUNTS, COLOURS, self._lists["animal"]))
        if kind == "year":
            return _pick(self._rng, self._lists["year"])
        word = self._stem(1) + _pick(self._rng, ENDINGS[kind])
        if kind != "city":
            return word
        return f"{_pick(self._rng, BEFORE)} {word.capitalize()}" if self._rng.random() < 0.15 else word.capitalize()

    def _stem(self, count: int) -> str:
        while True:
            stem = "".join(_pick(self._rng, part) for _ in range(count) for part in (ONSETS, VOWELS, CODAS))
            if self._mine(stem):
                return stem

    def _mine(self, word: str) -> bool:
        return (zlib.crc32(word.encode()) % 5 == 0) == self._held_out


def _paragraph(rng: np.random.Generator, words: _Words, name: str, unanswerable: float) -> Any:
    count = int(rng.integers(2, 5))
    first, last = words.names("first", count), words.names("last", count)
    facts = _facts(rng, words, count)
    text = _Text()
    seen: set[int] = set()
    for template, mine in _sentences(rng, facts):
        if rng.random() < 0.15:
            text.add(_pick(rng, FILLER), "", ())
        person = mine[0].person
        full = f"{first[person]} {last[person]}"
        text.add(template, full if person not in seen else _pick(rng, (full, first[person], last[person])), mine)
        seen.add(person)
    qas = []
    for number, fact in enumerate(_asked(rng, facts)):
        missing = rng.random() < unanswerable
        if missing:
            stated = {(f.person, f.relation) for f in facts}
            absent = [(p, r) for p in range(count) for r in RELATIONS if (p, r) not in stated]
            person, relation = absent[int(rng.integers(len(absent)))]
        else:
            person, relation = fact.person, fact.relation
        who = first[person] if rng.random() < 0.5 else f"{first[person]} {last[person]}"
        span = {"text": fact.value, "answer_start": text.at[fact]}
        same_type = [f for f in sorted(facts, key=lambda f: text.at[f]) if f.type == RELATIONS[relation].type]
        qas.append(
            {
                "id": f"{name}-{number}",
                "question": _pick(rng, RELATIONS[relation].asked).replace("{n}", who),
                "answers": [] if missing else [span],
                "kind": "none" if missing else _kind(fact, facts),
                "same_type": [{"text": f.value, "answer_start": text.at[f]} for f in same_type],
            }
            | ({"is_impossible": missing} if unanswerable else {})
        )
    return {"context": text.text, "qas": qas}


def _facts(rng: np.random.Generator, words: _Words, count: int) -> list[_Fact]:
    """Draw facts; half of the paragraphs state one relation of everybody, all state relations of single people."""
    order = _sample(rng, list(RELATIONS), len(RELATIONS))
    shared = rng.random() < 0.5
    who = [(person, order[0]) for person in range(count)] if shared else []
    who += [(int(rng.integers(count)), relation) for relation in order[1 : 3 if shared else 5]]
    facts: list[_Fact] = []
    for person, relation in who:
        taken = {fact.value for fact in facts}
        value = words.answer(RELATIONS[relation].type)
        while value in taken:
            value = words.answer(RELATIONS[relation].type)
        facts.append(_Fact(person, relation, value))
    return facts


def _sentences(rng: np.random.Generator, facts: list[_Fact]) -> Iterator[tuple[str, tuple[_Fact, ...]]]:
    """Yield templates and their facts in a random order; two facts of one person may share a sentence."""
    left = [facts[i] for i in rng.permutation(len(facts))]
    while left:
        fact = left.pop(0)
        partner = next((other for other in left if other.person == fact.person), None)
        forms = RELATIONS[fact.relation]
        if partner is not None and rng.random() < 0.5:
            left.remove(partner)
            first = _numbered(_pick(rng, forms.verbs), 0)
            second = _numbered(_pick(rng, RELATIONS[partner.relation].verbs), 1)
            yield _pick(rng, (f"{{n}} {first} and {second}.", f"{{n}}, who {first}, {second}.")), (fact, partner)
        elif rng.random() < 0.4:
            yield _numbered(_pick(rng, forms.whole), 0), (fact,)
        else:
            yield f"{{n}} {_numbered(_pick(rng, forms.verbs), 0)}.", (fact,)


def _asked(rng: np.random.Generator, facts: list[_Fact]) -> list[_Fact]:
    """Choose up to three facts to ask about, at most two of kind "binding"."""
    shuffled = [facts[i] for i in rng.permutation(len(facts))]
    binding = [fact for fact in shuffled if _kind(fact, facts) == "binding"]
    return binding[:2] + [fact for fact in shuffled if fact not in binding][: 1 if binding else 3]


def _kind(fact: _Fact, facts: list[_Fact]) -> str:
    if sum(other.relation == fact.relation for other in facts) > 1:
        return "binding"
    return "relation" if sum(other.type == fact.type for other in facts) > 1 else "type"


def _numbered(template: str, number: int) -> str:
    return template.replace("{x}", f"{{x{number}}}")


def _parts(template: str) -> Iterator[str]:
    """Split a template into its text and its placeholders {…}."""
    for piece in template.replace("{", "\0{").replace("}", "}\0").split("\0"):
        if piece:
            yield piece


def _pick(rng: np.random.Generator, options: Any) -> str:
    return options[int(rng.integers(len(options)))]


def _sample(rng: np.random.Generator, options: list[str], count: int) -> list[str]:
    return [options[i] for i in rng.choice(len(options), count, replace=False)]
