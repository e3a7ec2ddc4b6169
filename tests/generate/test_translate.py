"""Texts in, texts out: the same answers as rows decoded by themselves, whatever the batch."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.core.types import Params
from fm_jax.data.text import tokenizer
from fm_jax.generate import beam, decode
from fm_jax.generate.translate import translate
from fm_jax.models.language import encoder_decoder

TEXTS = ("The man sees the dog.", "Today we sing.", "I", "The dog sleeps because the man sings.", "We see the old man.")
TOKENIZER = tokenizer.train([*TEXTS] * 3, 300, sentinels=2)
SOURCE, NEW = 30, 12


@cache
def model() -> tuple[encoder_decoder.EncoderDecoder, Params]:
    tiny = encoder_decoder.t5(2, 16, 2, 32, 8, vocab_size=300)
    module = encoder_decoder.EncoderDecoder(tiny)
    variables = jax.jit(module.init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32))
    # spread out, so that answers differ and some of them end
    return module, jax.tree.map(lambda leaf: 2 * leaf, meta.unbox(variables["params"]))


def answers(*texts: str, **options: object) -> list[str]:
    return translate(*model(), TOKENIZER, texts, source_length=SOURCE, max_new_tokens=NEW, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("beams", [None, beam.Config(3, length_penalty=0.6)])
def test_an_answer_does_not_depend_on_its_batch_or_place(beams: beam.Config | None) -> None:
    together = answers(*TEXTS, beams=beams, batch_size=5)
    assert len(set(together)) > 2
    assert answers(*TEXTS, beams=beams, batch_size=2) == together
    assert answers(*TEXTS[::-1], beams=beams, batch_size=2) == together[::-1]


def test_greedy_answers_are_those_of_the_decoder_given_each_source() -> None:
    module, params = model()
    for text, answer in zip(TEXTS[1:3], answers(*TEXTS[1:3]), strict=True):
        ids = np.array([[*TOKENIZER.encode(text), TOKENIZER.end_id]], np.int32)  # no padding at all
        out = decode.generate(
            module,
            params,
            [[TOKENIZER.pad_id]],
            [1],
            max_new_tokens=NEW,
            context={"source": ids, "source_length": np.array([ids.shape[1]])},
            eos_id=TOKENIZER.end_id,
        )
        new = np.asarray(out.tokens[0, : int(out.lengths[0])])
        assert answer == TOKENIZER.decode(new[new != TOKENIZER.end_id])


def test_one_beam_answers_as_greedy_does() -> None:
    assert answers(*TEXTS, beams=beam.Config(1)) == answers(*TEXTS)


def test_the_prefix_is_read_before_the_text() -> None:
    assert answers("sees the dog.", prefix="The man ") == answers("The man sees the dog.")
    assert answers("sees the dog.", prefix="The man ") != answers("sees the dog.")


def test_a_long_text_loses_its_end_and_no_texts_have_no_answers() -> None:
    long = " ".join(TEXTS)
    kept = TOKENIZER.decode(TOKENIZER.encode(long)[: SOURCE - 1])
    assert answers(long) == answers(kept)
    assert answers() == []


def test_what_cannot_work_is_refused() -> None:
    module, params = model()
    with pytest.raises(ConfigError, match="batch_size"):
        answers("a", batch_size=0)
    with pytest.raises(ConfigError, match="exceed max_length 512"):
        translate(module, params, TOKENIZER, TEXTS, source_length=SOURCE, max_new_tokens=512)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(NumericError, match="'I'"):
        translate(module, broken, TOKENIZER, ["I"], source_length=SOURCE, max_new_tokens=NEW)
