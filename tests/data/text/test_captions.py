"""CLIP's tokenizer as its files state it, and captions as rows of one length."""

import json

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text import captions, tokenizer

TEXTS = [f"A big red ring, number {i}; it's on the left of a blue square" for i in range(50)]


@pytest.fixture(scope="module")
def made():
    return captions.train(TEXTS, 540)


def test_ids_are_laid_out_as_the_authors(made):
    assert [made.token(i) for i in (0, 255, 256, 511)][2].endswith("</w>") and made.vocab_size == 540
    assert not made.token(255).endswith("</w>") and made.token(511) == made.token(255) + "</w>"
    assert [made.token(i) for i in (538, 539)] == ["<|startoftext|>", "<|endoftext|>"]
    assert (made.special("start"), made.end_id, made.pad_id) == (538, 539, 539)


def test_case_and_spaces_go_and_any_text_is_encoded(made):
    assert made.decode(made.encode("  A BIG\n Red   ring")) == "a big red ring"
    assert made.decode(made.encode("naïve 漢字 😀")) == "naïve 漢字 😀"
    assert made.decode(made.encode("it's 42")) == "it 's 4 2"
    spelt = made.encode("<|endoftext|>")
    assert 539 not in spelt and len(spelt) > 1  # whoever writes a caption cannot end it


def test_rows_have_one_length_and_end_with_the_end_token(made):
    words = made.encode("a big red ring").tolist()
    found = captions.rows(made, ["a big red ring", "", "a big red ring on the left of it"], 7)
    assert found.tokens.shape == (3, 7) and found.tokens.dtype == np.int32 and found.cut == 1
    assert found.tokens[0].tolist() == ([538, *words, 539] + [539] * 7)[:7]
    assert found.tokens[1].tolist() == [538] + [539] * 6
    assert found.tokens[2].tolist()[:1] + found.tokens[2].tolist()[-1:] == [538, 539]
    with pytest.raises(DataError, match="7 are the most"):
        captions.rows(made, ["a big red ring on the left of it"], 7, strict=True)
    with pytest.raises(ConfigError, match="no room"):
        captions.rows(made, ["a"], 1)
    with pytest.raises(DataError, match="does not put its end token"):
        captions.rows(tokenizer.train(TEXTS, 280), ["a"], 7)


def test_a_folder_gives_the_tokenizer_back(made, tmp_path):
    made.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert again.encode_pair("A Red ring").ids.tolist() == made.encode_pair("A Red ring").ids.tolist()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "CLIPTokenizer"
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer.load(tmp_path).special("start") == 538


def test_too_small_or_too_large_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="alone need 514"):
        captions.train(TEXTS, 513)
    with pytest.raises(DataError, match="not vocab_size 5000"):
        captions.train(TEXTS, 5000)
