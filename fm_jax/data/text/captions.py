"""CLIP's tokenizer, and captions as rows of one length.

CLIP (Radford et al. 2021) lower-cases its texts and removes spaces before byte-pair encoding, so spaces and case do not
come back. A word's last token ends in </w>. Ids are those of the authors' layout: the 256 bytes, the 256 bytes that end
a word, the merges, <|startoftext|>, and <|endoftext|> as the last id of all.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fm_jax.core.errors import ConfigError, DataError, shown
from fm_jax.data.text.tokenizer import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
NAMES = {"start": START, "end": END, "unknown": END, "pad": END}
LENGTH = 77
"""Tokens of a caption of CLIP, with its start and end token."""

_SUFFIX = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Captions(NamedTuple):
    """Captions as rows of one length."""

    tokens: np.ndarray  # [B, T] int32: start token, text, end token, padding
    cut: int  # captions that were too long and lost their end


def rows(tokenizer: Tokenizer, texts: Sequence[str], length: int = LENGTH, *, strict: bool = False) -> Captions:
    """Tokenise captions to rows [B, length]; a longer one is cut but keeps its end token, where it is read.

    Args:
        tokenizer: a tokenizer that frames a text with its end token, as those of CLIP and SigLIP do.
        texts: captions.
        length: tokens of a row, the special ones included.
        strict: refuse a longer caption instead of cutting it.

    Raises:
        ConfigError: `length` has no room for the special tokens.
        DataError: the tokenizer adds no end token; or, if strict, a caption is too long.
    """
    frame = tokenizer.encode_pair("").ids
    if len(frame) == 0 or frame[-1] != tokenizer.end_id:
        raise DataError("the tokenizer does not put its end token after a text; captions are read at that token")
    if length < len(frame):
        raise ConfigError(f"length {length} has no room for the {len(frame)} special tokens of a caption")
    tokens, cut = np.full((len(texts), length), tokenizer.pad_id, np.int32), 0
    for row, (text, item) in enumerate(zip(texts, tokenizer.encode_pairs(texts), strict=True)):
        if len(item.ids) > length:
            if strict:
                raise DataError(f"{shown(text)} has {len(item.ids)} tokens, and {length} are the most; shorten it")
            cut += 1
        tokens[row, : len(item.ids)] = [*item.ids[: length - 1], frame[-1]] if len(item.ids) > length else item.ids
    return Captions(tokens, cut)


def train(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
    """Train CLIP's tokenizer; any text can be encoded.

    Args:
        texts: training texts, read once.
        vocab_size: number of tokens, including the 512 of single bytes and the two special ones.
        min_frequency: rarer pairs are not merged.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes.
        DataError: too little text for `vocab_size` tokens.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*alphabet, *(byte + _SUFFIX for byte in alphabet)]
    if vocab_size < (least := len(vocab) + 2):
        raise ConfigError(f"vocab_size {vocab_size} is too small; bytes and special tokens alone need {least}")
    learner = _around(tokenizers.Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        end_of_word_suffix=_SUFFIX,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges, known = list[tuple[str, str]](), dict.fromkeys(vocab)
    for first, second in json.loads(learner.to_str())["model"]["merges"]:
        if len(known) + 2 == vocab_size:
            break
        merges.append((first, second))
        known[first + second] = None
    if len(known) + 2 != vocab_size:
        raise DataError(f"the text gives {len(known) + 2} tokens, not vocab_size {vocab_size}; lower it or add text")
    ids = {token: index for index, token in enumerate([*known, START, END])}
    how = {"continuing_subword_prefix": "", "end_of_word_suffix": _SUFFIX, "unk_token": END}
    inner = _around(tokenizers.Tokenizer(models.BPE(ids, merges, **how)))
    inner.add_special_tokens([START, END])
    inner.post_processor = _frame(ids)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "clean_up_tokenization_spaces": False}
    return Tokenizer(inner, NAMES, config=config)


def _around(inner: Any) -> Any:
    """Give a tokenizer CLIP's way of reading and cutting text, as its files state it."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    inner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    return inner


def _frame(ids: dict[str, int]) -> Any:
    from tokenizers import processors

    return processors.RobertaProcessing((END, ids[END]), (START, ids[START]), False, False)
