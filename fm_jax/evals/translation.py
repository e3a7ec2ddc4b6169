"""How good translations are: corpus BLEU and chrF by sacrebleu, exact matches by phenomenon, and what must be beaten.

BLEU is Papineni et al. 2002 as Post 2018 (sacrebleu) computes it, chrF Popović 2015; each comes with its signature,
which says everything that a number can be compared by. Baselines: the source copied, and each word replaced by its
likeliest translation in the training pairs (IBM model 1, Brown et al. 1993).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals import style

_WORD = re.compile(r"[\w-]+")


def require() -> None:
    """Refuse to begin without sacrebleu: called before a run computes anything.

    Raises:
        ConfigError: sacrebleu is missing.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        message = 'translations are scored by sacrebleu; install it: pip install "fm_jax[translate]"'
        raise ConfigError(message) from error


def score(hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> dict[str, Any]:
    """Return {"bleu", "chrf": 0 to 100, "exact": share of equal texts, "bleu_signature", "chrf_signature"}.

    Args:
        hypotheses: one translation a sentence.
        references: one reference a sentence.
        tokenize: sacrebleu's tokenisation for BLEU: "13a" is that of WMT's reports, "intl" splits more symbols,
            "none" takes words as spaces part them (for made-up token languages).

    Raises:
        DataError: no sentences, or different numbers of them.
        ConfigError: sacrebleu is missing, or does not know the tokenisation.
    """
    _check(hypotheses, references)
    require()
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if tokenize not in BLEU.TOKENIZERS:
        raise ConfigError(f"sacrebleu has no tokenisation {tokenize!r}; it has {', '.join(sorted(BLEU.TOKENIZERS))}")
    # "none" is meant where it is asked for, so sacrebleu's warning that texts look tokenised is of no use
    bleu, chrf = BLEU(tokenize=tokenize, force=True), CHRF()
    found = {
        "bleu": bleu.corpus_score(list(hypotheses), [list(references)]).score,
        "chrf": chrf.corpus_score(list(hypotheses), [list(references)]).score,
        "exact": exact(hypotheses, references),
    }
    signatures = {"bleu_signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature())}
    return found | signatures


def exact(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of translations that are the reference, letter by letter."""
    _check(hypotheses, references)
    return float(np.mean([one == other for one, other in zip(hypotheses, references, strict=True)]))


def exact_by(
    hypotheses: Sequence[str], references: Sequence[str], labels: Sequence[Sequence[str]]
) -> dict[str, tuple[float, int]]:
    """Return {label: (share of exact matches, number)} over the sentences that carry each label, the hardest first.

    Raises:
        DataError: different numbers of sentences and labels.
    """
    _check(hypotheses, references)
    if len(labels) != len(references):
        raise DataError(f"{len(references)} sentences have {len(labels)} rows of labels")
    hits: dict[str, list[bool]] = {}
    for one, other, names in zip(hypotheses, references, labels, strict=True):
        for name in names:
            hits.setdefault(name, []).append(one == other)
    shares = {name: (float(np.mean(found)), len(found)) for name, found in hits.items()}
    return dict(sorted(shares.items(), key=lambda item: item[1][0]))


class Dictionary:
    """A word-by-word translator: every source word becomes the target word that it most likely gives."""

    def __init__(self, best: Mapping[str, str]) -> None:
        """Take {source word: target word}; a word that is not in it stays as it is."""
        self.best = dict(best)

    def translate(self, text: str) -> str:
        """Return the text with its words replaced where they stand; punctuation and a first capital stay."""
        replaced = _WORD.sub(lambda word: self.best.get(word[0], word[0]), text)
        joined = " ".join(replaced.split())
        return joined[:1].upper() + joined[1:] if text[:1].isupper() else joined


def learn_dictionary(sources: Sequence[str], targets: Sequence[str], *, iterations: int = 8) -> Dictionary:
    """Learn a dictionary from pairs by IBM model 1: expectation-maximisation of t(target word | source word).

    Every target word is explained by one word of its source sentence, whichever it is, with no regard to order; the
    dictionary takes the most likely target word of each source word, and nothing for one that explains less than half
    a target word each time it occurs (the "do" of "do not"). Words keep their case.

    Args:
        sources: training sentences.
        targets: their translations.
        iterations: of EM, from uniform probabilities.

    Raises:
        DataError: no pairs, different numbers of sentences, or iterations below 1.
    """
    _check(sources, targets)
    if iterations < 1:
        raise DataError(f"a dictionary takes at least 1 iteration, not {iterations}")
    words, occurrences, (source, target, place) = _links(sources, targets)
    entries, entry = np.unique(source * len(words[1]) + target, return_inverse=True)
    of = entries // len(words[1])  # the source word of each entry of the table
    table = np.ones(len(entries))
    for _ in range(iterations):
        likely = table[entry]
        share = likely / np.bincount(place, likely)[place]
        counts = np.bincount(entry, share, minlength=len(entries))
        table = counts / np.bincount(of, counts)[of]
    explained = np.bincount(of, counts) / occurrences
    best: dict[str, str] = {}
    for number in np.argsort(table, kind="stable"):  # the likeliest of each word is written last
        word = of[number]
        best[words[0][word]] = words[1][entries[number] % len(words[1])] if explained[word] >= 0.5 else ""
    del best[""]
    return Dictionary(best)


def _links(
    sources: Sequence[str], targets: Sequence[str]
) -> tuple[tuple[list[str], list[str]], np.ndarray, np.ndarray]:
    """Return the words of both sides, how often each source word occurs, and every link between words of a pair.

    Links are [3, N]: source word, target word, position of the target word in the corpus. Every source sentence also
    has the empty word, which explains what no other does.
    """
    known: tuple[dict[str, int], dict[str, int]] = {"": 0}, {}
    links, seen, position = list[np.ndarray](), list[np.ndarray](), 0
    for pair in zip(sources, targets, strict=True):
        left, right = (
            np.array([numbers.setdefault(word, len(numbers)) for word in _WORD.findall(text)], np.int64)
            for numbers, text in zip(known, pair, strict=True)
        )
        left = np.append(left, 0)
        places = np.arange(position, position + len(right))
        links.append(np.stack([np.tile(left, len(right)), np.repeat(right, len(left)), np.repeat(places, len(left))]))
        position += len(right)
        seen.append(left)
    found = np.concatenate(links, axis=1)
    if not found.size:
        raise DataError("the targets hold no word to learn")
    return (list(known[0]), list(known[1])), np.bincount(np.concatenate(seen)), found


def phenomenon_bars(png: Path, systems: Mapping[str, Mapping[str, tuple[float, int]]], *, title: str = "") -> None:
    """Draw exact matches by phenomenon, {system: {phenomenon: (share, number)}}, a bar of each system side by side.

    Phenomena are those of the first system, in its order, the first on top.

    Raises:
        DataError: no systems, or no phenomena.
        ConfigError: matplotlib is missing.
    """
    names = list(next(iter(systems.values()), {}))
    if not names:
        raise DataError("there is no phenomenon to draw")
    first = next(iter(systems.values()))
    height = 0.8 / len(systems)
    with style.picture(png, 7.2, 1.1 + 0.27 * len(names) * max(1, len(systems) * 0.7)) as axes:
        for i, (system, shares) in enumerate(systems.items()):
            places = np.arange(len(names)) + (i - (len(systems) - 1) / 2) * height
            values = [100 * shares[name][0] if name in shares else 0.0 for name in names]
            bars = axes.barh(
                places, values, height=height * 0.92, color=style.COLORS[i % len(style.COLORS)], label=system
            )
            axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], padding=3, fontsize=8.5)
        axes.set_yticks(range(len(names)), [f"{name} ({first[name][1]})" for name in names], fontsize=9.5)
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.set_xlabel("exact matches among the sentences with it (%); in brackets: how many")
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if len(systems) > 1:
            axes.figure.legend(loc="outside lower center", ncols=min(len(systems), 4))


def _check(left: Sequence[str], right: Sequence[str]) -> None:
    if not len(left) or len(left) != len(right):
        raise DataError(f"{len(left)} texts and {len(right)} to compare them with; there must be some, and as many")
