"""A text, or a pair of texts, as token ids with the position, word and text of each token."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """One text or a pair, tokenised as model input, with the tokenizer's special tokens."""

    ids: np.ndarray  # int32 [T]
    types: np.ndarray  # int32 [T]: 1 for the second text if the tokenizer has token types
    offsets: np.ndarray  # int32 [T, 2]: start and end character in the token's own text; (0, 0) for special tokens
    words: np.ndarray  # int32 [T]: index of the word, counted through both texts; -1 for special tokens
    parts: np.ndarray  # int32 [T]: 0 first text, 1 second text, -1 special tokens


def read(item: Any) -> Encoded:
    """Convert an `Encoding` of the tokenizers library."""
    parts = np.array([-1 if part is None else part for part in item.sequence_ids], np.int32)
    words = np.array([-1 if word is None else word for word in item.word_ids], np.int32)
    special = np.array(item.special_tokens_mask, bool)
    parts[special], words[special] = -1, -1
    words[parts == 1] += words[parts == 0].max(initial=-1) + 1
    return Encoded(
        ids=np.array(item.ids, np.int32),
        types=np.array(item.type_ids, np.int32),
        offsets=np.array(item.offsets, np.int32).reshape(-1, 2),
        words=words,
        parts=parts,
    )


def part(pair: Encoded, token: int) -> Encoded:
    """Insert a separator token between the texts of a pair; its token type is that of the first text."""
    at = int((pair.parts == 0).sum())
    return replace(
        pair,
        ids=np.insert(pair.ids, at, token),
        types=np.insert(pair.types, at, 0),
        offsets=np.insert(pair.offsets, at, 0, axis=0),
        words=np.insert(pair.words, at, -1),
        parts=np.insert(pair.parts, at, -1),
    )
