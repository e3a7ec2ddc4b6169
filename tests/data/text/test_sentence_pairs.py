import inspect
import itertools
from collections import Counter

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.stream import loader
from fm_jax.data.text import corpus, documents, tokenizer, tokens
from fm_jax.data.text.corpus import Corpus
from fm_jax.data.text.sentence_pairs import FullSentences, SentencePairs, truncate
from fm_jax.data.text.sentences import Sentences
from tests.data.conftest import ONLY


class Texts(list[str]):
    fingerprint = "texts"


@pytest.fixture(scope="module")
def small_bert(data_dir) -> Corpus:  # type: ignore[no-untyped-def]
    return corpus.prepare(
        documents.Config(only=ONLY), data_dir, vocab_size=600, splits=("train",), scheme="wordpiece", by_sentence=True
    )


@pytest.fixture(scope="module")
def pairs(small_bert: Corpus) -> SentencePairs:
    return SentencePairs(small_bert.tokens("train"), small_bert.tokenizer, 64)


def parts(row: dict[str, np.ndarray]) -> tuple[list[int], list[int]]:
    used = int(row["length"])
    ids, types = row["tokens"][:used], row["types"][:used]
    return ids[types == 0][1:-1].tolist(), ids[types == 1][:-1].tolist()


def decoded(found: Corpus) -> list[str]:
    """Each document's tokens as a string that can be searched."""
    stream, starts = found.tokens("train")[:], found.tokens("train").starts
    texts, now = [], ""
    for start, stop in itertools.pairwise(starts):
        if stop - start == 1:
            texts.append(now)
            now = ""
        now += "".join(map(chr, stream[start + 1 : stop]))
    return [text for text in texts if text]


def test_a_row_is_two_framed_texts(pairs: SentencePairs, small_bert: Corpus) -> None:
    words = small_bert.tokenizer
    cls, sep, pad = words.special("cls"), words.special("sep"), words.pad_id
    for index in range(len(pairs)):
        row = pairs[index]
        used, ids = int(row["length"]), row["tokens"]
        assert ids[0] == cls and ids[used - 1] == sep and (ids[:used] == sep).sum() == 2 and (ids[used:] == pad).all()
        second = int(np.flatnonzero(ids == sep)[0]) + 1
        assert (row["types"] == ((np.arange(64) >= second) & (np.arange(64) < used))).all()
        assert (row["weights"] == (np.arange(64) < used)).all() and row["weights"].dtype == np.float32
        special = np.isin(ids, (cls, sep, pad))
        assert ((row["words"] == -1) == special).all()
        inside = row["words"][~special]
        assert inside[0] == 0 and set(np.diff(inside).tolist()) <= {0, 1}  # on from A to B
        assert row["words"][second] > row["words"][second - 2]
        assert all(parts(row))
    assert {name: value.dtype.name for name, value in row.items() if name != "weights"} == dict.fromkeys(
        ("tokens", "types", "length", "words", "not_next"), "int32"
    )


def test_what_follows_follows_and_what_does_not_is_of_another_document(
    pairs: SentencePairs, small_bert: Corpus
) -> None:
    texts = decoded(small_bert)
    seen: Counter[int] = Counter()
    for index in range(len(pairs)):
        row = pairs.draw(index, np.random.default_rng(index + 9999))
        one, two = ("".join(map(chr, part)) for part in parts(row))
        homes = [{i for i, text in enumerate(texts) if part in text} for part in (one, two)]
        assert all(homes)
        if row["not_next"]:
            assert homes[0] != homes[1] or len(homes[0]) > 1
        else:
            # both in one document, the second behind the first and apart by at most what was cut off between them
            gaps = [
                text.find(two, text.find(one) + len(one)) - text.find(one) - len(one)
                for text in (texts[i] for i in homes[0] & homes[1])
            ]
            assert gaps and max(gaps) >= 0
        seen[int(row["not_next"])] += 1
    assert abs(seen[1] / seen.total() - 0.5) < 4 * 0.5 / np.sqrt(seen.total())


class _Coin:
    """A generator whose coin for the label falls as it is told; all else is as drawn."""

    def __init__(self, seed: int, not_next: bool) -> None:
        self._rng, self._answer = np.random.default_rng(seed), not_next
        self.integers = self._rng.integers

    def random(self) -> float:
        value = self._rng.random()
        caller = inspect.currentframe().f_back.f_code.co_name  # type: ignore[union-attr]
        return (0.25 if self._answer else 0.75) if caller == "draw" else value


def test_lengths_say_nothing_about_the_label(pairs: SentencePairs) -> None:
    ends = Counter[tuple[bool, bool]]()
    for index in range(len(pairs)):
        rows = [pairs.draw(index, _Coin(index, answer)) for answer in (False, True)]  # type: ignore[arg-type]
        assert [int(row["not_next"]) for row in rows] == [0, 1]
        lengths = [tuple(map(len, parts(row))) for row in rows]
        assert lengths[0] == lengths[1]  # exactly, draw for draw
        assert parts(rows[0])[0] == parts(rows[1])[0]  # the first text is the same
        for label, row in enumerate(rows):
            ends[bool(label), row["tokens"][row["length"] - 2] == parts(rows[0])[1][-1]] += 1
    assert ends[False, True] == len(pairs)


def test_nor_does_it_show_whether_the_second_text_was_cut(pairs: SentencePairs, small_bert: Corpus) -> None:
    stop = small_bert.tokenizer.encode(".")[0]
    share: dict[int, list[bool]] = {0: [], 1: []}
    for visit in range(8):
        for index in range(len(pairs)):
            row = pairs.draw(index, np.random.default_rng((visit, index)))
            share[int(row["not_next"])].append(parts(row)[1][-1] == stop)
    assert abs(np.mean(share[0]) - np.mean(share[1])) < 0.04


def test_rows_are_full_but_for_a_tenth_at_most(pairs: SentencePairs) -> None:
    lengths = np.array(
        [pairs.draw(i, np.random.default_rng((v, i)))["length"] for v in range(4) for i in range(len(pairs))]
    )
    assert np.median(lengths) == 64 and 0.01 < (lengths < 64).mean() < 0.2


def test_pairs_are_drawn_anew_in_training_and_stay_in_evaluation(pairs: SentencePairs) -> None:
    assert all((pairs[2][name] == pairs[2][name]).all() for name in pairs[2])
    drawn = {str(pairs.draw(2, np.random.default_rng(seed))["tokens"].tolist()) for seed in range(6)}
    assert len(drawn) >= 5
    stream = loader.Batches(pairs, 8, threads=0).iterate()
    assert next(stream)["not_next"].shape == (8,)


def test_the_longer_text_is_cut_from_both_ends() -> None:
    rng = np.random.default_rng(0)
    one, two = np.arange(100), np.arange(1000, 1010)
    cut, same = truncate(one, two, 40, rng)
    assert same.tolist() == two.tolist() and len(cut) == 30 and (np.diff(cut) == 1).all()
    assert 15 < cut[0] < 55  # 70 of 100 go, about half of them in front
    first, second = truncate(one, one, 31, rng)
    assert sorted((len(first), len(second))) == [15, 16]
    assert [len(part) for part in truncate(two, two, 40, rng)] == [10, 10]


def test_full_sentences_run_on_over_documents(small_bert: Corpus) -> None:
    words = small_bert.tokenizer
    rows = FullSentences(small_bert.tokens("train"), words, 64)
    sep, lengths, crossed = words.special("sep"), [], 0
    for index in range(len(rows)):
        row = rows[index]
        used = int(row["length"])
        assert used <= 64 and row["tokens"][0] == words.special("cls") and row["tokens"][used - 1] == sep
        assert not row["types"].any() and "not_next" not in row
        assert ((row["words"] >= 0) == ~np.isin(row["tokens"], (words.special("cls"), sep, words.pad_id))).all()
        crossed += (row["tokens"] == sep).sum() > 1
        lengths.append(used)
    assert np.mean(lengths) > 45 and crossed > 0
    assert (rows[1]["tokens"] == rows[1]["tokens"]).all()


def test_documents_of_one_sentence_are_drawn_from_but_make_no_pair(tmp_path) -> None:  # type: ignore[no-untyped-def]
    texts = Texts(["Alone.", "One two. Three four. Five six."])
    words = tokenizer.train_wordpiece([*texts, *texts], 50)
    stream = tokens.write(Sentences(texts), words, tmp_path / "two")
    found = SentencePairs(stream, words, 32)
    assert len(found) == 1
    alone = words.encode("Alone.").tolist()
    rows = [found.draw(0, np.random.default_rng(seed)) for seed in range(20)]
    others = [parts(row)[1] for row in rows if row["not_next"]]
    assert others and all(part == alone[: len(part)] for part in others)
    stream = tokens.write(Sentences(Texts(texts[1:2])), words, tmp_path / "one")
    with pytest.raises(DataError, match="has one document"):
        len(SentencePairs(stream, words, 32))
    with pytest.raises(DataError, match="rows of 4 tokens are too short"):
        SentencePairs(stream, words, 4)
