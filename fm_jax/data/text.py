"""Tokens to rows of one shape, by random access: blocks of a stream, packed documents, padded labelled texts.

The shift by one is made here and nowhere else: targets[t] is the token after tokens[t].
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.packing import pack
from fm_jax.data.tokenizer import Tokenizer
from fm_jax.data.tokens import Tokens

Row = dict[str, np.ndarray]


class Blocks:
    """The stream cut every `length` tokens: {"tokens", "targets": int32 [T], "weights": float32 [T]}.

    Every token but the stream's first is a target exactly once; the last block is filled up with weight 0. With
    `apart`, rows also have "segments" and "positions" [T], so that attention and positions stop at documents.
    """

    def __init__(self, tokens: Tokens, length: int, *, apart: bool = False, name: str = "") -> None:
        _check_length(length)
        self._tokens, self._length, self._apart = tokens, length, apart
        self.name = name or f"blocks of {tokens.folder}"
        self.fingerprint = f"blocks-{length}-{int(apart)}-{tokens.fingerprint}"
        self.limits: Mapping[str, int] = {"tokens": tokens.vocab_size, "targets": tokens.vocab_size}

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self._length)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._length
        row = shifted(self._tokens[start : start + self._length + 1], self._length, self._tokens.index.pad_id)
        if self._apart:
            row |= _segments(row["tokens"], row["weights"], self._tokens.index.end_id)
        return row


class Packed:
    """Whole documents, several to a row: the fields of `Blocks` with "segments" (1, 2, …; 0 is empty) and "positions".

    A document longer than a row is cut into rows, each of which starts again at position 0; no token is dropped.
    """

    def __init__(self, tokens: Tokens, length: int, *, name: str = "") -> None:
        _check_length(length)
        self._tokens, self._length = tokens, length
        self.name = name or f"packed documents of {tokens.folder}"
        self.fingerprint = f"packed-{length}-{tokens.fingerprint}"
        self.limits: Mapping[str, int] = {"tokens": tokens.vocab_size, "targets": tokens.vocab_size}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        starts, lengths = self._pieces
        row = _empty(self._length, self._tokens.index.pad_id)
        row |= {name: np.zeros(self._length, np.int32) for name in ("segments", "positions")}
        at = 0
        for segment, piece in enumerate(self._rows[index], start=1):
            start, length = int(starts[piece]), int(lengths[piece])
            found, here = self._tokens[start : start + length + 1], slice(at, at + length)
            row["tokens"][here], row["targets"][here], row["weights"][here] = found[:-1], found[1:], 1.0
            row["segments"][here], row["positions"][here] = segment, np.arange(length)
            at += length
        return row

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each piece starts in the stream and how many of its tokens are inputs: int64 [pieces] each.

        The inputs of a document are its leading END and its tokens; the targets its tokens and the END behind it.
        """
        starts, ends = self._tokens.starts[:-1], self._tokens.starts[1:]
        counts = -(-(ends - starts) // self._length)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = np.repeat(starts, counts) + within * self._length
        return begin, np.minimum(np.repeat(ends, counts) - begin, self._length)

    @cached_property
    def _rows(self) -> list[list[int]]:
        return pack(self._pieces[1], self._length)


class Labelled:
    """Texts cut or padded to `length`: {"tokens": int32 [T], "length", "label": int32 [], "weights": float32 []}."""

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        tokenizer: Tokenizer,
        *,
        length: int,
        num_classes: int,
        name: str = "labelled texts",
    ) -> None:
        _check_length(length)
        if not len(texts) or len(texts) != len(labels):
            raise DataError(f"{name}: {len(texts)} texts and {len(labels)} labels; there must be some, and as many")
        ids = tokenizer.encode_batch(texts)
        self.cropped = sum(len(found) > length for found in ids)
        """Number of texts that were longer than `length` and lost their ends."""
        self._lengths = np.array([min(len(found), length) for found in ids], np.int32)
        self._tokens = np.full((len(ids), length), tokenizer.pad_id, np.int32)
        for row, found in zip(self._tokens, ids, strict=True):
            row[: len(found)] = found[:length]
        if not self._lengths.all():
            raise DataError(f"{name}: text {int(self._lengths.argmin())} is empty")
        self._labels = np.asarray(labels, np.int32)
        self.name = name
        digest = hashlib.sha256(self._tokens.tobytes() + self._labels.tobytes()).hexdigest()
        self.fingerprint = f"labelled-{length}-{digest[:16]}"
        self.limits: Mapping[str, int] = {"tokens": tokenizer.vocab_size, "label": num_classes}

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        return {
            "tokens": self._tokens[index],
            "length": self._lengths[index],
            "label": self._labels[index],
            "weights": np.float32(1.0),
        }


def shifted(stream: np.ndarray, length: int, pad_id: int) -> Row:
    """Return inputs and targets of a stretch of up to `length` + 1 tokens, filled up with weight 0."""
    row, used = _empty(length, pad_id), len(stream) - 1
    row["tokens"][:used], row["targets"][:used], row["weights"][:used] = stream[:-1], stream[1:], 1.0
    return row


def _empty(length: int, pad_id: int) -> Row:
    return {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "weights": np.zeros(length, np.float32),
    }


def _segments(tokens: np.ndarray, weights: np.ndarray, end_id: int) -> Row:
    """Return segments (documents, counted from 1) and positions (from each document's leading END) of one row."""
    opens = tokens == end_id
    opens[0] = True
    here = np.arange(len(tokens), dtype=np.int32)
    begun = np.maximum.accumulate(np.where(opens, here, 0)).astype(np.int32)
    inside = weights > 0
    return {
        "segments": np.where(inside, np.cumsum(opens), 0).astype(np.int32),
        "positions": np.where(inside, here - begun, 0).astype(np.int32),
    }


def _check_length(length: int) -> None:
    if length < 1:
        raise DataError(f"rows need at least 1 token, not {length}")
