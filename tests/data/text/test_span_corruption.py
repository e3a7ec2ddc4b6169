from collections import Counter

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream import loader
from fm_jax.data.text import corpus, documents
from fm_jax.data.text import span_corruption as spans
from fm_jax.data.text.corpus import Corpus
from fm_jax.data.text.span_corruption import SpanCorruption
from tests.data.conftest import ONLY

SENTINELS = np.arange(999, 899, -1, dtype=np.int32)


@pytest.fixture(scope="module")
def small_t5(data_dir) -> Corpus:  # type: ignore[no-untyped-def]
    splits = ("train", "validation")
    return corpus.prepare(documents.Config(only=ONLY), data_dir, vocab_size=500, scheme="t5", splits=splits)


def restored(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Put the spans of the targets where the inputs have their sentinels."""
    found: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token >= 900:
            here = found.setdefault(token, [])
        else:
            here.append(token)
    return [part for token in inputs[:-1].tolist() for part in found.pop(token, [token])]


def test_inputs_and_targets_make_the_text_again() -> None:
    rng = np.random.default_rng(0)
    for length in rng.integers(2, 601, 1000):
        ids = rng.integers(2, 900, length).astype(np.int32)
        mask = spans.noise_mask(length, rng)
        inputs, targets = spans.corrupt(ids, mask, SENTINELS, 1)
        noise, count = spans.counts(length)
        assert restored(inputs, targets) == ids.tolist()
        assert mask.sum() == noise and not mask[0] and mask[-1]
        for side in (inputs, targets):  # as many sentinels, in their order, and one end
            assert side[side >= 900].tolist() == SENTINELS[:count].tolist() and side[-1] == 1 and side.dtype == np.int32
        assert targets[0] == SENTINELS[0] and inputs[-2] == SENTINELS[count - 1]
        assert [token for token in targets.tolist() if 2 <= token < 900] == ids[mask].tolist()


def test_512_inputs_are_568_tokens_of_text_and_114_targets() -> None:
    assert spans.lengths(512) == (568, 114) and spans.counts(568) == (85, 28)
    for inputs in range(4, 200):
        text, targets = spans.lengths(inputs)
        noise, count = spans.counts(text)
        assert text - noise + count + 1 <= inputs and targets == noise + count + 1
        more = spans.counts(text + 1)
        assert text + 1 - more[0] + more[1] + 1 > inputs  # none longer fits
    with pytest.raises(ConfigError, match="at least 3 tokens, not 2"):
        spans.lengths(2)


def test_density_and_span_lengths_are_the_papers() -> None:
    rng = np.random.default_rng(1)
    masks = np.stack([spans.noise_mask(568, rng) for _ in range(2000)])
    assert (masks.sum(1) == 85).all()
    starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (starts.sum(1) == 28).all()  # so spans are 85 / 28 = 3.04 tokens on average
    # A random composition of 85 into 28 parts: a part is 1 with chance 27 / 84.
    drawn = ("".join("01"[int(m)] for m in mask).split("0") for mask in masks[:500])
    sizes = Counter(len(span) for row in drawn for span in row)
    sizes.pop(0)
    assert abs(sizes[1] / sizes.total() - 27 / 84) < 0.02
    assert abs(masks[:, 100:500].mean() - 0.15) < 0.01  # everywhere alike, but for the ends


def test_more_is_left_out_where_asked() -> None:
    rng = np.random.default_rng(2)
    mask = spans.noise_mask(100, rng, density=0.5, mean_span=10)
    assert mask.sum() == 50 and (np.diff(mask.astype(int)) == 1).sum() == 5
    assert spans.counts(10, density=0.9, mean_span=1.0) == (9, 1)  # a kept span cannot be empty


def test_rows_hold_the_stream_and_are_shifted_once(small_t5: Corpus) -> None:
    tokens, words = small_t5.tokens("train"), small_t5.tokenizer
    rows = SpanCorruption(tokens, words, 64)
    stream = tokens[:]
    plain, read = stream[stream != words.end_id].tolist(), []
    for index in range(len(rows)):
        row = rows[index]
        used = int(row["weights"].sum())
        assert row["source"].shape == (64,) and row["targets"].shape == (rows.target_length,)
        assert row["tokens"][0] == words.pad_id and (row["tokens"][1:used] == row["targets"][: used - 1]).all()
        assert row["targets"][used - 1] == words.end_id and not row["targets"][used:].any()
        assert not row["source"][row["source_length"] :].any() and row["source"][row["source_length"] - 1] == 1
        back = np.full(600, -1)  # sentinels to the numbers that `restored` knows
        back[:500] = np.arange(500)
        back[words.sentinels] = SENTINELS[: len(words.sentinels)]
        read += restored(back[row["source"][: row["source_length"]]], back[row["targets"][:used]])
    assert read == plain[: len(read)] and len(plain) - len(read) < 2
    assert rows[0]["source_length"] == 64  # whole stretches fill the inputs


def test_spans_are_drawn_anew_in_training_and_stay_in_evaluation(small_t5: Corpus) -> None:
    rows = SpanCorruption(small_t5.tokens("train"), small_t5.tokenizer, 64)
    assert (rows[3]["source"] == rows[3]["source"]).all()
    drawn = [rows.draw(3, np.random.default_rng(seed))["source"].tolist() for seed in range(5)]
    assert len({str(one) for one in drawn}) == 5
    batch = next(loader.Batches(rows, 8, threads=0).iterate())
    assert batch["tokens"].shape == (8, rows.target_length) and batch["source_length"].shape == (8,)


def test_too_few_sentinels_are_refused(small_t5: Corpus, small: Corpus) -> None:
    with pytest.raises(DataError, match="0"):
        SpanCorruption(small.tokens("train"), small.tokenizer, 64)
    with pytest.raises(DataError, match="sentinels, but the tokenizer has 100"):
        SpanCorruption(small_t5.tokens("train"), small_t5.tokenizer, 4096)
    with pytest.raises(DataError, match="2 spans need 2 sentinels, but the tokenizer has 1"):
        spans.corrupt(np.arange(9), np.arange(9) % 4 == 3, SENTINELS[:1], 1)
    with pytest.raises(DataError, match="is too short for span corruption"):
        spans.counts(1)
    with pytest.raises(ConfigError, match="density must be"):
        SpanCorruption(small_t5.tokens("train"), small_t5.tokenizer, 64, density=1.0)
