from functools import partial

import jax
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.generate import decode
from fm_jax.generate.sample import Config
from fm_jax.generate.text import text
from fm_jax.hub.generation import Generation
from tests.generate import toy

LETTERS = "\0abcdefghijklmnopqr"  # 19 ids; 0 is the end


class Letters:
    end_id = 0

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join(LETTERS[token] for token in ids)


def alphabet():
    """a → b → … → q → r → end → a."""
    model, params = toy.chain({token: (token + 1) % 19 for token in range(19)}, 19)
    return model, params, Letters()


def test_text_is_what_follows_without_end_and_stop():
    write = partial(text, *alphabet(), max_new_tokens=6)
    assert write(["ab", "k", "lmnop"], eos_id=()) == ["cdefgh", "lmnopq", "qr\0abc"]
    assert write(["ab", "k", "lmnop"]) == ["cdefgh", "lmnopq", "qr"]
    assert write(["ab", "k", "lmnop"], stop=["efg", "d", "no"]) == ["c", "lm", "qr"]


def test_a_text_ends_where_the_checkpoint_says():
    write = partial(text, *alphabet(), ["ab"], max_new_tokens=6)
    k, e = LETTERS.index("k"), LETTERS.index("e")
    assert write(generation=Generation({"eos_token_id": [k, e]})) == ["cd"]
    assert write(generation=Generation({"eos_token_id": e}, {"eos_token_id": LETTERS.index("f")})) == ["cde"]
    assert text(*alphabet(), ["p"], max_new_tokens=4, generation=Generation({"pad_token_id": 0})) == ["qr"]
    assert text(*alphabet(), ["p"], max_new_tokens=4, generation=Generation({"eos_token_id": None})) == ["qr\0a"]
    assert write(eos_id=LETTERS.index("d"), generation=Generation({"eos_token_id": e})) == ["c"]


def test_a_prompt_may_be_token_ids():
    assert text(*alphabet(), [np.array([1, 2]), [11], "lm"], max_new_tokens=3) == ["cde", "lmn", "nop"]


def test_an_id_beyond_the_tokenizer_loses_no_text():
    class Short(Letters):
        def decode(self, ids) -> str:
            return super().decode([token for token in ids if token < 5])

    model, params, _ = alphabet()
    assert text(model, params, Short(), ["ab", "q"], max_new_tokens=3, eos_id=()) == ["cd", "\0a"]


def test_a_start_token_lets_a_text_begin_from_nothing():
    assert text(*alphabet(), ["", "c"], max_new_tokens=3, start_id=0) == ["abc", "def"]


def test_a_stop_string_that_is_spelt_otherwise_is_still_cut():
    class Pairs(Letters):
        def encode(self, text: str) -> list[int]:
            return [18] if text == "ef" else super().encode(text)

    model, params, _ = alphabet()
    assert text(model, params, Pairs(), ["ab"], max_new_tokens=6, stop=["gh", "ef"]) == ["cd"]


def test_a_tokenizer_that_drops_leading_spaces_keeps_them_here():
    class Stripping(Letters):
        def decode(self, ids) -> str:
            return super().decode(ids).replace("c", " ").lstrip()

    model, params, _ = alphabet()
    assert text(model, params, Stripping(), ["ab"], max_new_tokens=3) == [" de"]


def test_order_and_batch_do_not_matter_and_shapes_are_few():
    model, params = toy.markov(19)
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(list(LETTERS[1:]), size)) for size in rng.integers(1, 13, 11)]
    write = partial(text, model, params, Letters(), prompts, max_new_tokens=7, cfg=Config(0.9), key=jax.random.key(0))
    compiled = decode._generate._cache_size()
    by_four = write(batch_size=4)
    assert decode._generate._cache_size() - compiled == 1  # eleven lengths, three batches, one shape
    assert write(batch_size=1) == by_four
    assert len(set(by_four)) > 1


def test_prompts_that_cannot_work_are_refused_by_index():
    model, params = toy.markov(19)
    with pytest.raises(
        ConfigError, match=r"prompt 1 has 26 tokens; with max_new_tokens 7 that is 33, more than max_length 32"
    ):
        text(model, params, Letters(), ["a", "a" * 26], max_new_tokens=7)
    with pytest.raises(ConfigError, match=r"prompt 0 \(''\) has no tokens"):
        text(model, params, Letters(), ["", "a"], max_new_tokens=7)
    for wrong in (-1, 19):
        with pytest.raises(
            ConfigError, match=f"prompt 1 has token id {wrong} at position 2; the model has rows 0 … 18"
        ):
            text(model, params, Letters(), ["a", [1, 2, wrong]], max_new_tokens=7)
    with pytest.raises(ConfigError, match="a stop string is empty"):
        text(model, params, Letters(), ["a"], max_new_tokens=7, stop=[""])


def test_a_prompt_may_fill_the_context():
    model, params = toy.markov(19)
    [written] = text(model, params, Letters(), ["a" * 25], max_new_tokens=7, eos_id=())
    assert len(written) == 7


def test_numbers_that_are_not_finite_are_not_passed_off_as_text():
    model, params, letters = alphabet()
    broken = {"table": params["table"] * np.nan}
    with pytest.raises(NumericError, match="log-probabilities after 'ab' are not finite"):
        text(model, broken, letters, ["ab"], max_new_tokens=6)
