"""Tokens to rows of one shape, by random access: blocks of a stream, packed documents, padded labelled texts.

Only this file shifts by one: targets[t] is the token after tokens[t].
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.text import encoded as encodings
from fm_jax.data.text.encoded import Encoded
from fm_jax.data.text.packing import pack
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.data.text.tokens import Tokens

Row = dict[str, np.ndarray]


class Blocks:
    """The stream cut every T = `length` tokens: {"tokens", "targets": int32 [T], "weights": float32 [T]}.

    Every token except the stream's first is a target exactly once; the last block is padded with weight 0. With
    `apart`, rows also have "segments" and "positions" [T], so attention and positions stop at document boundaries.
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
    """Whole documents, several per row: the fields of `Blocks`, "segments" (1, 2, …; 0 is padding) and "positions".

    A document longer than a row is split into rows that each start at position 0; no token is dropped.
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
            ids, here = self._tokens[start : start + length + 1], slice(at, at + length)
            row["tokens"][here], row["targets"][here], row["weights"][here] = ids[:-1], ids[1:], 1.0
            row["segments"][here], row["positions"][here] = segment, np.arange(length)
            at += length
        return row

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Start of each piece in the stream, and its number of inputs: int64 [pieces] each.

        A document's inputs are its leading END and its tokens; its targets are its tokens and the END after them.
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
    """Texts or pairs with the tokenizer's special tokens, truncated or padded to T = `length`, with labels.

    Rows are {"tokens", "types": int32 [T], "length", "label": int32 [], "weights": float32 []}. Truncation removes the
    end of a text (of the longer text of a pair) and keeps the special tokens. If the tokenizer adds no special tokens,
    its end token separates the texts of a pair.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        tokenizer: Tokenizer,
        *,
        length: int,
        num_classes: int,
        second: Sequence[str] | None = None,
        name: str = "labelled texts",
    ) -> None:
        _check_length(length)
        if not len(texts) or len(texts) != len(labels):
            raise DataError(
                f"{name}: {len(texts)} texts and {len(labels)} labels; both need the same number, at least 1"
            )
        for index, label in enumerate(labels):
            if not 0 <= label < num_classes:
                raise DataError(f"{name}: text {index} has label {label}, outside 0 to {num_classes - 1}")
        rows = tokenizer.encode_pairs(texts, second)
        for part, kind in enumerate(("text", "second text")[: 1 if second is None else 2]):
            if (empty := next((i for i, row in enumerate(rows) if part not in row.parts), -1)) >= 0:
                raise DataError(f"{name}: {kind} {empty} is empty")
        if second is not None and all((row.parts >= 0).all() for row in rows):
            rows = [encodings.part(row, tokenizer.end_id) for row in rows]
        self.truncated = sum(len(row.ids) > length for row in rows)
        """Number of truncated texts."""
        self._lengths = np.array([min(len(row.ids), length) for row in rows], np.int32)
        self._tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
        self._types = np.zeros((len(rows), length), np.int32)
        for tokens, types, row in zip(self._tokens, self._types, rows, strict=True):
            kept = shortened(row, length)
            tokens[: len(kept)], types[: len(kept)] = row.ids[kept], row.types[kept]
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
            "types": self._types[index],
            "length": self._lengths[index],
            "label": self._labels[index],
            "weights": np.float32(1.0),
        }


def shortened(encoded: Encoded, length: int) -> np.ndarray:
    """Return the positions [≤ length] of the tokens to keep: all special tokens, and the starts of the texts.

    The longer text of a pair is truncated first, until both have equal length.

    Raises:
        DataError: `length` leaves no room for text besides the special tokens.
    """
    sizes = [int((encoded.parts == part).sum()) for part in (0, 1)]
    room = length - (special := int((encoded.parts < 0).sum()))
    if room < sum(size > 0 for size in sizes):
        raise DataError(f"length {length} leaves no room for text beside {special} special tokens; raise the length")
    if sum(sizes) > room:
        short = min(*sizes, room // 2) if min(sizes) else 0
        longer = int(sizes[1] >= sizes[0])
        sizes[longer], sizes[1 - longer] = room - short, short
    order = np.zeros(len(encoded.parts), np.int32)  # index of each token within its text
    for part in (0, 1):
        mine = encoded.parts == part
        order[mine] = np.arange(mine.sum())
    limits = np.array([*sizes, len(order) + 1])[encoded.parts]  # part -1 (special tokens) indexes the last entry
    return np.flatnonzero(order < limits)


def shifted(stream: np.ndarray, length: int, pad_id: int) -> Row:
    """Return inputs and targets [length] of up to `length` + 1 consecutive tokens, padded with weight 0."""
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
    """Return one row's segments [T] (documents from 1) and positions [T] (from each document's leading END)."""
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
        raise DataError(f"length must be at least 1 token, not {length}")
