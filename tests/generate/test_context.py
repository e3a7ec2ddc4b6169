"""Generation by a model that reads a source beside its tokens: T5 through the same decoding and the same beams."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.generate import decode
from fm_jax.generate.beam import Config, search
from fm_jax.generate.decode import generate
from fm_jax.generate.text import text
from fm_jax.models.language import encoder_decoder
from fm_jax.ops.positions import Buckets
from tests.close import close
from tests.generate import toy

VOCAB, NEW = 19, 10
SOURCE = np.random.default_rng(0).integers(0, VOCAB, (3, 9)).astype(np.int32)
SOURCE_LENGTH = np.array([9, 5, 2], np.int32)
CONTEXT = {"source": SOURCE, "source_length": SOURCE_LENGTH}
STARTS, ONES = np.zeros((3, 1), np.int32), np.ones(3, np.int32)


@cache
def t5(vocab_size=VOCAB):
    """A tiny T5 for texts of up to 24 tokens: beyond the 16 at which the buckets end."""
    cfg = encoder_decoder.t5(2, 16, 2, 24, 8, vocab_size=vocab_size)
    model = encoder_decoder.EncoderDecoder(replace(cfg, max_length=24, buckets=Buckets(8, 16), tied=False))
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), STARTS, SOURCE, SOURCE_LENGTH)["params"])
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), params)


@cache
def _forward(model):
    return jax.jit(lambda params, tokens, source: model.apply({"params": params}, tokens, source))


def full(texts, row, vocab_size=VOCAB):
    """The logits [N, 24, V] of texts after source `row`, without a cache and without padding of the source."""
    model, params = t5(vocab_size)
    padded = np.zeros((len(texts), 24), np.int32)
    for place, tokens in enumerate(texts):
        padded[place, : len(tokens)] = tokens
    source = np.repeat(SOURCE[row : row + 1, : SOURCE_LENGTH[row]] % vocab_size, len(texts), axis=0)
    return np.asarray(_forward(model)(params, padded, source))


def rows(out):
    return [tokens[:count].tolist() for tokens, count in zip(np.asarray(out.tokens), out.lengths, strict=True)]


def test_cached_logits_equal_a_full_forward_at_every_step():
    """Prompts and sources are ragged, and the texts outgrow the buckets: the bias must count from the past."""
    model, params = t5()
    texts = np.random.default_rng(1).integers(0, VOCAB, (3, 24)).astype(np.int32)
    expected = [full([one], row)[0] for row, one in enumerate(texts)]
    for at, logits in toy.cached(model, params, texts, np.array([3, 6, 1]), CONTEXT):
        for row in range(3):
            close(logits[row], expected[row][at[row] - 1])


@pytest.fixture(scope="module")
def greedy():
    return generate(*t5(), STARTS, ONES, max_new_tokens=NEW, context=CONTEXT)


def test_greedy_is_the_argmax_of_a_full_forward_at_every_step(greedy):
    for row, new in enumerate(rows(greedy)):
        logits = full([[0, *new]], row)[0, :NEW]
        assert new == logits.argmax(-1).tolist() and len(new) == NEW
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(NEW), new]
        close(greedy.logprobs[row], expected)
    assert len(set(map(tuple, rows(greedy)))) == 3  # it is the source that decides


def test_a_row_is_the_same_alone_and_under_any_padding_of_its_source(greedy):
    model, params = t5()
    run = partial(generate, model, params, max_new_tokens=NEW)
    for row in range(3):
        own = {"source": SOURCE[row : row + 1, : SOURCE_LENGTH[row]], "source_length": SOURCE_LENGTH[row : row + 1]}
        assert rows(run(STARTS[:1], ONES[:1], context=own)) == [rows(greedy)[row]]
    beyond = np.where(np.arange(9) < SOURCE_LENGTH[:, None], SOURCE, 10_000)  # an id that looks up NaN
    wider = {"source": np.pad(beyond, ((0, 0), (0, 4)), constant_values=5), "source_length": SOURCE_LENGTH}
    assert rows(run(STARTS, ONES, context=wider)) == rows(greedy)


def test_it_works_inside_jit_and_equal_calls_compile_once(greedy):
    model, params = t5()
    compiled = decode._generate._cache_size()
    other = {**CONTEXT, "source": SOURCE[::-1]}
    generate(type(model)(model.cfg), params, STARTS, ONES, max_new_tokens=NEW, context=other)
    assert decode._generate._cache_size() == compiled
    run = partial(generate, model, params, STARTS, ONES, max_new_tokens=NEW)
    assert rows(jax.jit(lambda context: run(context=context))(CONTEXT)) == rows(greedy)


def test_one_beam_is_greedy(greedy):
    beam = search(*t5(), STARTS, ONES, max_new_tokens=NEW, context=CONTEXT, cfg=Config(1))
    np.testing.assert_array_equal(beam.tokens[:, 0], greedy.tokens)


def test_a_wide_search_equals_brute_force():
    """Every beam must go on reading its own row's source."""
    size, new, end = 4, 3, 1
    model, params = t5(size)
    context = {**CONTEXT, "source": SOURCE % size}
    cfg = Config(12, length_penalty=1.0, early_stopping="never")
    out = search(model, params, STARTS, ONES, max_new_tokens=new, context=context, cfg=cfg, eos_id=end, pad_id=9)
    for row in range(3):
        every = sorted({t[: t.index(end) + 1] if end in t else t for t in product(range(size), repeat=new)})
        logprobs = np.asarray(jax.nn.log_softmax(full([[0, *tokens] for tokens in every], row, size)))
        known = {
            tokens: logprobs[place, np.arange(len(tokens)), tokens].sum() / len(tokens)
            for place, tokens in enumerate(every)
        }
        best = sorted(known.values(), reverse=True)[:12]
        close(out.scores[row], np.array(best))
        found = [tuple(t[:n].tolist()) for t, n in zip(np.asarray(out.tokens)[row], out.lengths[row], strict=True)]
        close([known[tokens] for tokens in found], best)


class Letters:
    """One id a letter; 0 and 1 are the padding and the end, and have none."""

    end_id = 1

    def encode(self, text):
        return ["abcdefghijklmnopq".index(letter) + 2 for letter in text]

    def decode(self, ids):
        return "".join("abcdefghijklmnopq"[token - 2] for token in ids if token > 1)


def test_texts_come_in_the_order_of_their_sources():
    model, params = t5()
    run = partial(text, model, params, Letters(), max_new_tokens=NEW, start_id=0)
    got = run(["", "", ""], context=CONTEXT, batch_size=2)
    out = rows(generate(model, params, STARTS, ONES, max_new_tokens=NEW, context=CONTEXT, eos_id=1))
    assert got == [Letters().decode(new) for new in out]
    # sorted by length, the batches hold other rows than those that stand side by side
    mixed = run(["abc", "", "ab"], context=CONTEXT, batch_size=2)
    assert mixed[1] == got[1] and len({*got, *mixed}) > 3
    logits = full([[0, *Letters().encode("ab" + mixed[2])]], 2)[0]
    assert Letters().encode(mixed[2]) == logits[2 : 2 + len(mixed[2])].argmax(-1).tolist() != []


def test_a_context_of_another_batch_is_refused():
    short = {name: array[:2] for name, array in CONTEXT.items()}
    for run in (generate, search):
        with pytest.raises(
            ConfigError, match=r"context 'source' has shape \(2, 9\); its first axis must be the 3 prompts"
        ):
            run(*t5(), STARTS, ONES, max_new_tokens=NEW, context=short)
    with pytest.raises(ConfigError, match="3 prompts need 3 rows of context, but 'source' has 2"):
        text(*t5(), Letters(), ["", "", ""], max_new_tokens=2, start_id=0, context=short)


def test_a_source_cannot_be_left_out():
    with pytest.raises(ConfigError, match="needs a source"):
        generate(*t5(), STARTS, ONES, max_new_tokens=NEW)
