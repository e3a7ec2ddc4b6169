"""Rows for BERT's pretraining, drawn anew at every visit: pairs of texts (Devlin et al. 2019), or full sentences.

A row is [CLS] A [SEP] B [SEP]. A and B are runs of whole sentences that fill the row, B the one that follows A, or, in
half of the rows, one of another document. In the authors' code a pair can be told by its length: whatever is last
in a document is shorter, and what is drawn for it is not. Here both candidates for B are drawn for every row and cut
to the shorter of the two before a coin decides, so the lengths of A and B say nothing at all about the label.

Both sources read a token stream of `sentences.Sentences`, in which an empty sentence closes every document.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.text import Row
from fm_jax.data.tokenizer import Tokenizer
from fm_jax.data.tokens import Tokens


class _Runs(NamedTuple):
    """Where the sentences of a stream stand; S sentences in D documents."""

    begins: np.ndarray  # int64 [S]: place of the first token in the stream
    sums: np.ndarray  # int64 [S + 1]: tokens in all sentences before
    documents: np.ndarray  # int64 [D + 1]: number of each document's first sentence
    owners: np.ndarray  # int64 [S]: number of the document

    def size(self, start: int, stop: int) -> int:
        """Return the tokens of sentences start … stop - 1."""
        return int(self.sums[stop] - self.sums[start])


class _Stream:
    """A token stream of sentences, and what rows are framed with."""

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, length: int, name: str, least: int) -> None:
        if length < least:
            raise DataError(f"rows of {length} tokens have no room; {least} are needed at least")
        self._tokens, self._length = tokens, length
        self._cls, self._sep = tokenizer.special("cls"), tokenizer.special("sep")
        self._pad, self._begins_word = tokenizer.pad_id, tokenizer.begins_word
        self.name = name or f"{type(self).__name__} of {tokens.folder}"
        self.limits: Mapping[str, int] = {"tokens": tokens.vocab_size}

    @cached_property
    def _runs(self) -> _Runs:
        starts = np.asarray(self._tokens.starts)
        sizes = np.diff(starts) - 1
        real = np.flatnonzero(sizes > 0)
        owners = np.cumsum(sizes == 0)[real]
        new = np.flatnonzero(np.diff(owners, prepend=-1))
        if not len(real):
            raise DataError(f"{self.name} holds no sentence")
        sums = np.concatenate([[0], np.cumsum(sizes[real])])
        documents = np.append(new, len(real))
        return _Runs(starts[real] + 1, sums, documents, np.repeat(np.arange(len(new)), np.diff(documents)))

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of sentences start … stop - 1, without the end tokens between them."""
        runs = self._runs
        found = self._tokens[runs.begins[start] : runs.begins[stop - 1] + runs.size(stop - 1, stop)]
        return found[found != self._tokens.index.end_id]

    def _row(self, parts: list[tuple[np.ndarray, int]]) -> Row:
        """Frame parts (tokens, type): [CLS] part [SEP] part [SEP] …."""
        row: Row = {}
        for name, fill in (("tokens", self._pad), ("types", 0), ("words", -1)):
            row[name] = np.full(self._length, fill, np.int32)
        row["tokens"][0], used, last = self._cls, 1, 0
        for part, kind in parts:
            here, end = slice(used, used + len(part)), used + len(part)
            begins = self._begins_word[part].copy()
            begins[:1] = True
            row["tokens"][here], row["tokens"][end] = part, self._sep
            row["types"][used : end + 1] = kind
            row["words"][here] = last - 1 + np.cumsum(begins)
            last, used = last + int(begins.sum()), end + 1
        weights = (np.arange(self._length) < used).astype(np.float32)
        return row | {"length": np.array(used, np.int32), "weights": weights}


class SentencePairs(_Stream):
    """Pairs: {"tokens", "types", "words": int32 [T], "length", "not_next": int32 [], "weights": float32 [T]}.

    `words` number the words of A and on to B, -1 for special tokens and padding; `not_next` is 0 where B follows A.
    `source[index]` is always the same draw. A document of one sentence has no pair and is no row, but may be B.
    Source: Devlin et al. 2019, appendix A.2, and create_pretraining_data.py of the authors.
    """

    def __init__(
        self, tokens: Tokens, tokenizer: Tokenizer, length: int, *, short: float = 0.1, name: str = ""
    ) -> None:
        """Take a stream of sentences, T, and the share of rows that are filled to a random length only."""
        super().__init__(tokens, tokenizer, length, name, 5)
        self._room, self._short = length - 3, short
        self.fingerprint = f"pairs-{length}-{short:g}-{tokens.fingerprint}-{tokenizer.fingerprint}"
        self.limits = {"tokens": tokens.vocab_size, "types": 2, "not_next": 2}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return a pair from the stretch of its document that row `index` stands for."""
        first, middle, stop = self._chunk(index, rng)
        follows, other = self._read(middle, stop), self._elsewhere(first, middle, stop, rng)
        size = min(len(follows), len(other))
        not_next = int(rng.random() < 0.5)
        chosen = (other if not_next else follows)[:size]
        one, two = truncate(self._read(first, middle), chosen, self._room, rng)
        return self._row([(one, 0), (two, 1)]) | {"not_next": np.array(not_next, np.int32)}

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The first row of each document, and last the number of all: int64 [D + 1]."""
        runs = self._runs
        if len(runs.documents) < 3:
            raise DataError(f"{self.name} holds one document; pairs need a second one to draw from")
        sizes = np.diff(runs.sums[runs.documents])
        rows = np.where(np.diff(runs.documents) > 1, np.maximum(1, sizes // self._room), 0)
        return np.concatenate([[0], np.cumsum(rows)])

    def _chunk(self, index: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Return where A starts, B starts and B ends, in sentences."""
        runs = self._runs
        target = self._room
        if rng.random() < self._short:
            target = int(rng.integers(2, self._room + 1))
        document = int(np.searchsorted(self._firsts, index, side="right")) - 1
        low, high = (int(number) for number in runs.documents[document : document + 2])
        number, count = index - int(self._firsts[document]), int(np.diff(self._firsts)[document])
        place = runs.sums[low] + (number + rng.random()) / count * runs.size(low, high)
        start = min(int(np.searchsorted(runs.sums, place, side="right")) - 1, high - 2)
        start, stop = _fill(runs, start, target, low, high)
        if stop - start < 2:
            stop += 1
        return start, int(rng.integers(start + 1, stop)), stop

    def _elsewhere(self, first: int, middle: int, stop: int, rng: np.random.Generator) -> np.ndarray:
        """Return a run of another document, in length the nearest to sentences middle … stop - 1 of eight tries.

        Of the nearest about as many are longer as are shorter. Were the longest taken, or the first to be long enough,
        what follows would keep its full stop at the end and what does not would lose it, and the end give it away.
        """
        runs = self._runs
        wanted, best = runs.size(middle, stop), (0, 0)
        mine, after = (int(number) for number in runs.documents[runs.owners[first] : runs.owners[first] + 2])
        for _ in range(8):
            start = int(rng.integers(len(runs.owners) - (after - mine)))
            start += (after - mine) * (start >= mine)  # any sentence but those of this document
            low, high = (int(number) for number in runs.documents[runs.owners[start] : runs.owners[start] + 2])
            start, end = _fill(runs, start, wanted, low, high)
            if end - start > 1 and wanted - runs.size(start, end - 1) < runs.size(start, end) - wanted:
                end -= 1
            if abs(runs.size(start, end) - wanted) < abs(runs.size(*best) - wanted) or best == (0, 0):
                best = start, end
            if runs.size(*best) == wanted:
                break
        return self._read(*best)


class FullSentences(_Stream):
    """Rows of whole sentences, on over the ends of documents, where a [SEP] stands: RoBERTa's, without pairs.

    The fields are those of `SentencePairs` without "not_next"; "types" are 0. A sentence longer than a row is cut.
    Source: Liu et al. 2019, section 4.2, FULL-SENTENCES.
    """

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, length: int, *, name: str = "") -> None:
        super().__init__(tokens, tokenizer, length, name, 3)
        self.fingerprint = f"sentences-{length}-{tokens.fingerprint}-{tokenizer.fingerprint}"

    def __len__(self) -> int:
        return max(1, int(self._runs.sums[-1]) // (self._length - 2))

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return a row that begins with some sentence of the stretch that `index` stands for."""
        runs = self._runs
        place = (index + rng.random()) / len(self) * int(runs.sums[-1])
        start = min(int(np.searchsorted(runs.sums, place, side="right")) - 1, len(runs.owners) - 1)
        parts: list[tuple[np.ndarray, int]] = []
        room = self._length - 1
        while start < len(runs.owners) and room > 1:
            high = int(runs.documents[runs.owners[start] + 1])
            limit = runs.sums[start] + room - 1
            stop = min(int(np.searchsorted(runs.sums, limit, side="right")) - 1, high)
            if stop <= start:
                if parts:
                    break
                stop = start + 1
            parts.append((self._read(start, stop)[: room - 1], 0))
            room -= len(parts[-1][0]) + 1
            if stop < high:
                break
            start = stop
        return self._row(parts)


def truncate(one: np.ndarray, two: np.ndarray, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Take tokens off the longer text, each from its front or its back at random, until both fit into `room`."""
    sizes = [len(one), len(two)]
    fronts = [0, 0]
    for _ in range(sum(sizes) - room):
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        fronts[longer] += int(rng.random() < 0.5)
    return one[fronts[0] : fronts[0] + sizes[0]], two[fronts[1] : fronts[1] + sizes[1]]


def _fill(runs: _Runs, start: int, wanted: int, low: int, high: int) -> tuple[int, int]:
    """Return the run from `start` on that first has `wanted` tokens, begun earlier where the document ends before."""
    stop = int(np.searchsorted(runs.sums, runs.sums[start] + wanted))
    if stop > high:
        start = max(low, int(np.searchsorted(runs.sums, runs.sums[high] - wanted, side="right")) - 1)
        stop = high
    return start, max(stop, start + 1)
