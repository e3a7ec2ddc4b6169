"""The heads on an encoder: what they return, and that padding and token types go where they belong."""

import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.sentence import SentenceEncoder
from fm_jax.models.language.span import SpanFinder
from fm_jax.models.language.tagger import Tagger, discriminator
from tests.close import close

BERT = encoder.Encoder(encoder.tiny())
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 12), dtype=np.int32)
LENGTH = np.array([12, 5, 1], np.int32)
TYPES = np.tile(np.arange(12) > 3, (3, 1)).astype(np.int32)
INSIDE = np.arange(12) < LENGTH[:, None]
HEADS = {
    "tagger": Tagger(BERT, 4),
    "discriminator": discriminator(BERT),
    "span": SpanFinder(BERT),
    "sentence": SentenceEncoder(BERT),
}


def made(model):
    params = jax.jit(lambda key: meta.unbox(model.init(key, TOKENS, LENGTH)["params"]))(jax.random.key(0))
    return params, jax.jit(lambda tokens, types=None: model.apply({"params": params}, tokens, LENGTH, types))


@pytest.mark.parametrize("name", HEADS)
def test_padding_moves_nothing_and_types_do(name):
    params, apply = made(HEADS[name])
    assert set(params) == {"backbone", "head"} - ({"head"} if name == "sentence" else set())

    def real(out):
        parts = out if isinstance(out, tuple) else (out,)
        return np.concatenate([(part[INSIDE] if part.shape[:2] == (3, 12) else part).ravel() for part in parts])

    one, two = (real(apply(np.where(INSIDE, TOKENS, garbage))) for garbage in (0, 95))
    np.testing.assert_array_equal(one, two)
    assert np.abs(real(apply(TOKENS, TYPES)) - real(apply(TOKENS))).max() > 1e-4
    assert np.isfinite(one).all()


def test_an_answer_is_never_sought_in_the_padding():
    for logits in made(SpanFinder(BERT))[1](TOKENS, TYPES):
        assert logits.shape == (3, 12)
        assert (np.asarray(logits)[~INSIDE] == -1e30).all()
        assert (np.abs(np.asarray(logits)[INSIDE]) < 100).all()


def test_tags_and_replaced_tokens_are_scored_each():
    assert made(Tagger(BERT, 4))[1](TOKENS).shape == (3, 12, 4)
    params, apply = made(discriminator(BERT))
    assert apply(TOKENS).shape == (3, 12, 1)
    assert params["head"]["hidden"]["kernel"].shape == (32, 32)


@pytest.mark.parametrize("backbone", [BERT, decoder.Decoder(decoder.tiny())])
def test_a_sentence_is_the_mean_of_its_tokens_and_may_have_length_one(backbone):
    params, apply = made(SentenceEncoder(backbone))
    plain = np.asarray(apply(TOKENS))
    row = backbone.apply({"params": params["backbone"]}, TOKENS[1:2, :5], method="hidden")
    close(plain[1], np.asarray(row)[0].mean(axis=0))
    unit = SentenceEncoder(backbone, normalise=True).apply({"params": params}, TOKENS, LENGTH)
    close(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True))
