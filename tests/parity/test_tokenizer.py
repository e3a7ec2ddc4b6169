"""Our tokenizers' folders in live transformers, and its tokenizers' folders in ours: the same ids, frames and types."""

import numpy as np
import pytest
import transformers

from fm_jax.data.text import tokenizer
from tests.data.text.test_tokenizer_families import byte_level, metaspace, written

TEXTS = [f"The cat sat on the Mat, number {i}; naïve act_{i % 7}(self): return {i * i}!" for i in range(300)]
SAMPLES = ["The CAT  sat.", "naïve\n漢字 act_3(self) 😀", "a", "unheard-of wörds: don't!", " leading", "x" * 300]


def same(ours: tokenizer.Tokenizer, theirs: object) -> None:
    for first in SAMPLES:
        for second in (None, *SAMPLES[:2]):
            found = ours.encode_pair(first, second)
            wanted = theirs(first, second)  # type: ignore[operator]
            assert found.ids.tolist() == wanted["input_ids"]
            if "token_type_ids" in wanted:
                assert found.types.tolist() == wanted["token_type_ids"]
        assert ours.encode(first).tolist() == theirs.encode(first, add_special_tokens=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["bytes", "t5", "wordpiece", "cased"])
def test_our_folders_open_in_transformers(kind, tmp_path):
    made = {
        "bytes": lambda: tokenizer.train(TEXTS, 300),
        "t5": lambda: tokenizer.train(TEXTS, 340, sentinels=20),
        "wordpiece": lambda: tokenizer.train_wordpiece(TEXTS, 120),
        "cased": lambda: tokenizer.train_wordpiece(TEXTS, 140, lowercase=False),
    }[kind]()
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == made.vocab_size and theirs.pad_token_id == made.pad_id
    same(made, theirs)
    for role, name in (("mask", "mask"), ("cls", "cls"), ("sep", "sep"), ("end", "eos"), ("unknown", "unk")):
        known = getattr(theirs, f"{name}_token_id")
        assert known is None or known == made.special(role)
    if kind == "t5":
        assert made.sentinels == theirs.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    if kind in ("wordpiece", "cased"):
        assert theirs.mask_token_id == 4 and "token_type_ids" in theirs("a", "b")


def test_berts_own_class_writes_a_folder_that_opens(tmp_path):
    made = tokenizer.train_wordpiece(TEXTS, 120)
    vocab = {made.token(index): index for index in range(120)}
    theirs = transformers.BertTokenizer(vocab=vocab, do_lower_case=True)
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load(tmp_path)
    assert (ours.special("cls"), ours.end_id, ours.pad_id) == (2, 3, 0)
    same(ours, theirs)
    for text in SAMPLES:
        assert ours.encode(text).tolist() == made.encode(text).tolist()


@pytest.mark.parametrize("inner", ["gpt2", "roberta", "t5", "llama"])
def test_other_families_read_alike(inner, tmp_path):
    make = {
        "gpt2": lambda: byte_level(post=False),
        "roberta": lambda: byte_level(post=True),
        "t5": lambda: metaspace("Unigram"),
        "llama": lambda: metaspace("BPE"),
    }[inner]
    written(tmp_path, make(), {"tokenizer_class": "PreTrainedTokenizerFast"})
    same(tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_decoding_is_theirs(tmp_path):
    made = tokenizer.train_wordpiece(TEXTS, 120)
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = np.arange(120)
    wanted = theirs.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert made.decode(ids) == wanted
