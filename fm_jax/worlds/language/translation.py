"""A synthetic translation corpus: English sentences with their German, labelled by linguistic phenomena.

A sentence's split is a hash of its German, so train, validation and test share no sentence in either language, at any
size and seed (different English sentences may have the same German, never the reverse).
"""

import hashlib
from dataclasses import replace
from random import Random
from typing import Literal

from fm_jax.core.errors import DataError
from fm_jax.worlds.language import lexicon
from fm_jax.worlds.language.grammar import (
    PHENOMENA,
    Argument,
    Clause,
    Phrase,
    Sentence,
    because,
    condition,
    fronted,
    plain,
    that,
)
from fm_jax.worlds.language.lexicon import Adjective, Pronoun

__all__ = ["PHENOMENA", "SPLITS", "Sentence", "draw", "sentences", "split_of"]

Split = Literal["train", "validation", "test"]
SPLITS: dict[str, tuple[float, float]] = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


def split_of(sentence: Sentence) -> str:
    """Return the split of a sentence, by the hash of its German."""
    share = int.from_bytes(hashlib.sha256(sentence.target.encode()).digest()[:4], "big") / 2**32
    return next(name for name, (low, high) in SPLITS.items() if low <= share < high)


def sentences(split: Split, count: int, *, seed: int = 0, largest: int = 9_999) -> tuple[Sentence, ...]:
    """Return `count` different sentences of a split; a larger count with the same seed extends a smaller one.

    Args:
        split: train, validation or test.
        count: number of sentences.
        seed: seed of the generator.
        largest: the largest numeral.

    Raises:
        DataError: an unknown split, a count below 1, or numerals out of range.
    """
    if split not in SPLITS or count < 1 or not 2 <= largest <= 9_999:
        raise DataError(
            f"cannot generate {count} sentences of {split!r} with numerals up to {largest}; count must be at least 1, "
            f"split one of {', '.join(SPLITS)}, and largest 2 to 9999"
        )
    rng, drawn = Random(f"translation/{seed}"), dict[str, Sentence]()
    while len(drawn) < count:
        sentence = draw(rng, largest)
        if split_of(sentence) == split:
            drawn.setdefault(sentence.target, sentence)
    return tuple(drawn.values())


def draw(rng: Random, largest: int = 9_999) -> Sentence:
    """Draw one sentence: 40 % a single clause, 24 % with an adverb, 36 % with a second clause."""
    kind = rng.random()
    if kind < 0.40:
        return plain(_clause(rng, largest))
    if kind < 0.64:
        return fronted(rng.choice(list(lexicon.ADVERBS)), _clause(rng, largest))
    if kind < 0.80:
        matrix = Clause(_subject(rng, 0), lexicon.MATRIX[rng.choice(list(lexicon.MATRIX))])
        return that(matrix, _clause(rng, largest))
    pair = _clause(rng, largest, short=True), _clause(rng, largest, short=True)
    return because(*pair) if kind < 0.91 else condition(*pair)


def _clause(rng: Random, largest: int, *, short: bool = False) -> Clause:
    """Draw a clause; a short one has fewer adjectives and no recipient."""
    kind = rng.random()
    if kind < 0.12:
        return _being(rng, largest)
    subject = _subject(rng, largest, short=short)
    if kind < 0.30:
        clause = _alone(rng, subject, largest, short)
    elif kind < 0.42:
        verb, wanted = rng.choice(list(lexicon.DATIVE.values()))
        clause = Clause(subject, verb, ((_object(rng, wanted, largest, subject, short), "dative"),))
    elif kind < 0.56 and not short:
        verb, wanted = rng.choice(list(lexicon.GIVING.values()))
        given = _phrase(rng, wanted, largest, short)
        clause = Clause(subject, verb, ((_object(rng, "being", 0, subject, True), "dative"), (given, "accusative")))
    else:
        verb, wanted = rng.choice(list(lexicon.ACCUSATIVE.values()))
        clause = Clause(subject, verb, ((_object(rng, wanted, largest, subject, short), "accusative"),))
    if rng.random() < 0.18 and not any(isinstance(obj, Phrase) and obj.determiner == "no" for obj, _ in clause.objects):
        return replace(clause, modal=rng.choice(list(lexicon.MODALS.values())))  # "must … no" is not "muss … kein"
    return replace(clause, negated=rng.random() < 0.2 and all(_definite(obj) for obj, _ in clause.objects))


def _being(rng: Random, largest: int) -> Clause:
    """Draw "the dog is old"."""
    subject: Argument = rng.choice(list(lexicon.PRONOUNS.values()))
    kind = "being"
    if rng.random() < 0.7:
        kind = rng.choice(("being", "thing"))
        subject = replace(_phrase(rng, kind, largest, True, negative=False), adjective=None)
    predicate = rng.choice(_describing(kind))
    return Clause(subject, lexicon.BE, predicate=predicate, negated=rng.random() < 0.2)


def _alone(rng: Random, subject: Argument, largest: int, short: bool) -> Clause:
    """Draw an intransitive verb, mostly with a prepositional phrase of place or company."""
    verb, prepositions = rng.choice(list(lexicon.ALONE.values()))
    if rng.random() < 0.3:
        return Clause(subject, verb)
    preposition = rng.choice(lexicon.AFTER[prepositions])
    return Clause(subject, verb, place=(preposition, _phrase(rng, preposition.kind, largest, short, negative=False)))


def _subject(rng: Random, largest: int, *, short: bool = False) -> Argument:
    if rng.random() < 0.35:
        return rng.choice(list(lexicon.PRONOUNS.values()))
    return _phrase(rng, "being", largest, short, negative=False)


def _object(rng: Random, kind: str, largest: int, subject: Argument, short: bool) -> Argument:
    """Draw an object; pronouns only for beings, and none that would have to be reflexive."""
    if kind in ("being", "any") and rng.random() < 0.3:
        near = {"I": ("I", "we"), "we": ("I", "we"), "you": ("you",)}
        barred = near.get(subject.english, ()) if isinstance(subject, Pronoun) else ()
        return rng.choice([pronoun for pronoun in lexicon.PRONOUNS.values() if pronoun.english not in barred])
    return _phrase(rng, kind, largest, short)


def _phrase(rng: Random, kind: str, largest: int, short: bool, *, negative: bool = True) -> Phrase:
    noun, plural = rng.choice(lexicon.KINDS[kind]), rng.random() < 0.35
    described, chance = None, rng.random()
    if chance < (0.2 if short else 0.4):
        described = rng.choice(_describing("being" if noun in lexicon.BEINGS else "thing"))
    if plural and largest and rng.random() < 0.4:
        return Phrase(noun, "", described, True, _count(rng, largest))
    words, weights = ["the", "this", "my", "your", "our"], [40, 9, 9, 6, 6]
    words, weights = [*words, "" if plural else "a"], [*weights, 24]
    if negative:
        words, weights = [*words, "no"], [*weights, 6]
    return Phrase(noun, rng.choices(words, weights)[0], described, plural)


def _describing(kind: str) -> list[Adjective]:
    return [adjective for adjective in lexicon.ADJECTIVES.values() if adjective.kind in ("any", kind)]


def _count(rng: Random, largest: int) -> int:
    """Draw a numeral; small numbers are over-represented."""
    number = 1
    while number % 100 == 1:
        number = rng.randint(2, min(largest, rng.choices((12, 99, 999, 9_999), (35, 35, 15, 15))[0]))
    return number


def _definite(argument: Argument) -> bool:
    return isinstance(argument, Pronoun) or argument.determiner in ("the", "this", "my", "your", "our")
