"""A text, or a pair of texts, as token ids with what is known of each token."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """One text, or two, as a model takes them, with the tokenizer's special tokens."""

    ids: np.ndarray  # int32 [T]
    types: np.ndarray  # int32 [T]: 1 for the second text where the tokenizer tells them apart
    offsets: np.ndarray  # int32 [T, 2]: the characters of its own text, from … to; (0, 0) for special tokens
    words: np.ndarray  # int32 [T]: number of the word, counted on from the first text to the second; -1 for special
    parts: np.ndarray  # int32 [T]: 0 first text, 1 second text, -1 special tokens


def read(item: Any) -> Encoded:
    """Take over what the library encoded."""
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


def part(found: Encoded, token: int) -> Encoded:
    """Put a special token between the texts of a pair; it counts to the first."""
    at = int((found.parts == 0).sum())
    return replace(
        found,
        ids=np.insert(found.ids, at, token),
        types=np.insert(found.types, at, 0),
        offsets=np.insert(found.offsets, at, 0, axis=0),
        words=np.insert(found.words, at, -1),
        parts=np.insert(found.parts, at, -1),
    )
