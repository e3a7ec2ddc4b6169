"""Scores against numbers counted by hand, and the baselines on a language whose dictionary is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.scores import translation
from tests.close import close

pytest.importorskip("sacrebleu")
REFERENCES = ["Der Mann sieht den alten Hund.", "Heute singt das Kind."]


def test_a_perfect_translation_scores_100_and_the_signature_says_how() -> None:
    found = translation.score(REFERENCES, REFERENCES)
    close(found["bleu"], 100, 1e-9)
    assert found["chrf"] == 100
    assert found["exact"] == 1
    assert "tok:13a" in found["bleu_signature"] and "version" in found["chrf_signature"]
    assert "tok:none" in translation.score(REFERENCES, REFERENCES, tokenize="none")["bleu_signature"]


def test_bleu_is_the_geometric_mean_of_n_gram_precisions_over_the_whole_corpus() -> None:
    # 13a parts the full stop: 7 + 5 words; one word of the first sentence is wrong
    found = translation.score(["Der Mann sieht den alte Hund.", REFERENCES[1]], REFERENCES)
    precisions = [11 / 12, 8 / 10, 5 / 8, 3 / 6]
    close(found["bleu"], 100 * math.exp(np.mean(np.log(precisions))), 1e-9)
    assert found["exact"] == 0.5
    # without tokenisation "Hund." is one word: 6 + 4
    found = translation.score(["Der Mann sieht den alte Hund.", REFERENCES[1]], REFERENCES, tokenize="none")
    close(found["bleu"], 100 * math.exp(np.mean(np.log([9 / 10, 6 / 8, 4 / 6, 2 / 4]))), 1e-9)


def test_a_short_translation_pays_the_brevity_penalty() -> None:
    found = translation.score(["Der Mann sieht den alten", "Heute singt das Kind."], REFERENCES)
    close(found["bleu"], 100 * math.exp(1 - 12 / 10), 1e-9)


def test_exact_matches_are_counted_by_label_and_the_hardest_comes_first() -> None:
    found = translation.exact_by(["a", "b", "x"], ["a", "b", "c"], [("easy",), ("easy", "hard"), ("hard",)])
    assert found == {"hard": (0.5, 2), "easy": (1.0, 2)} and list(found) == ["hard", "easy"]


ENGLISH = "the man the dog a cat sees sings sleeps".split()
CODE = {"the": "da", "man": "mu", "dog": "du", "a": "ka", "cat": "mi", "sees": "vo", "sings": "lo", "sleeps": "zo"}


def corpus(*, seed: int = 0, count: int = 300) -> tuple[list[str], list[str]]:
    """Sentences whose words are translated one to one and put in the reverse order; "does" stands for nothing."""
    rng = np.random.default_rng(seed)
    sources, targets = [], []
    for _ in range(count):
        words = [str(word) for word in rng.choice(list(CODE), rng.integers(2, 6))]
        sources.append(" ".join([*words, "does"] if rng.random() < 0.5 else words) + ".")
        targets.append(" ".join(CODE[word] for word in reversed(words)) + ".")
    return sources, targets


def test_the_dictionary_is_found_whatever_the_order_of_words() -> None:
    dictionary = translation.learn_dictionary(*corpus())
    assert dictionary.best == {**CODE, "does": ""}
    assert dictionary.translate("the dog does sleep, a cat sings.") == "da du sleep, ka mi lo."
    assert dictionary.translate("the dog sings does.") == "da du lo ."
    assert dictionary.translate("The dog.") == "The du."  # a word it has not seen stays


def test_more_iterations_make_the_table_more_certain_not_less() -> None:
    sources, targets = corpus(seed=1, count=25)
    right = [
        sum(translation.learn_dictionary(sources, targets, iterations=n).best[word] == CODE[word] for word in CODE)
        for n in (1, 20)
    ]
    assert right[0] <= right[1] and right[1] >= 7


def test_the_bars_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shares = {"verb final": (0.5, 10), "plural": (1.0, 20)}
    translation.phenomenon_bars(tmp_path / "a.png", {"model": shares, "dictionary": {"plural": (0.1, 20)}}, title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="no phenomena"):
        translation.phenomenon_bars(tmp_path / "b.png", {})


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="1 texts and 2"):
        translation.score(["a"], REFERENCES)
    with pytest.raises(DataError, match="0 texts"):
        translation.exact([], [])
    with pytest.raises(DataError, match="2 sentences need as many rows of labels, not 1"):
        translation.exact_by(REFERENCES, REFERENCES, [("a",)])
    with pytest.raises(DataError, match="at least 1 iteration"):
        translation.learn_dictionary(["a"], ["b"], iterations=0)
    with pytest.raises(DataError, match="no words to learn"):
        translation.learn_dictionary(["a"], [" "])
    with pytest.raises(ConfigError, match=r"no tokenisation 'moses'; it has .*13a"):
        translation.score(REFERENCES, REFERENCES, tokenize="moses")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match="install"):
        translation.require()
    with pytest.raises(ConfigError, match="install"):
        translation.score(REFERENCES, REFERENCES)
