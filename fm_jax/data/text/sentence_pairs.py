"""Random rows for BERT's pretraining: sentence pairs (Devlin et al. 2019), or full sentences (RoBERTa).

A row is [CLS] A [SEP] B [SEP]. A and B are runs of whole sentences that fill the row. B follows A, or, in half of the
rows, comes from another document. In the authors' code the length of a pair reveals its label: a real B at the end of
a document is shorter, a random B is not. Here both candidates for B are drawn for every row and cut to the shorter
one before the label is chosen, so the lengths of A and B are independent of the label.

Both sources read a token stream of `sentences.Sentences`, in which an empty sentence ends every document.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.text.layout import Row
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.data.text.tokens import Tokens


class _Runs(NamedTuple):
    """Positions of the S sentences and D documents of a stream."""

    begins: np.ndarray  # int64 [S]: position of the sentence's first token in the stream
    sums: np.ndarray  # int64 [S + 1]: number of tokens in all earlier sentences
    documents: np.ndarray  # int64 [D + 1]: index of the document's first sentence
    owners: np.ndarray  # int64 [S]: index of the sentence's document

    def size(self, start: int, stop: int) -> int:
        """Return the number of tokens in sentences start … stop - 1."""
        return int(self.sums[stop] - self.sums[start])


class _Stream:
    """A token stream of sentences, and the special tokens of rows."""

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, length: int, name: str, least: int) -> None:
        if length < least:
            raise DataError(f"rows of {length} tokens are too short; use at least {least}")
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
            raise DataError(f"{self.name} contains no sentence")
        sums = np.concatenate([[0], np.cumsum(sizes[real])])
        documents = np.append(new, len(real))
        return _Runs(starts[real] + 1, sums, documents, np.repeat(np.arange(len(new)), np.diff(documents)))

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of sentences start … stop - 1, without the end tokens between them."""
        runs = self._runs
        ids = self._tokens[runs.begins[start] : runs.begins[stop - 1] + runs.size(stop - 1, stop)]
        return ids[ids != self._tokens.index.end_id]

    def _row(self, parts: list[tuple[np.ndarray, int]]) -> Row:
        """Build [CLS] part [SEP] part [SEP] … from parts (tokens, type)."""
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

    `words`: index of the word, counted through A and B; -1 for special tokens and padding. `not_next`: 0: B follows A.
    `source[index]` is always the same draw. A document of one sentence gives no row, but may be B.
    Source: Devlin et al. 2019, appendix A.2, and the authors' create_pretraining_data.py.
    """

    def __init__(
        self, tokens: Tokens, tokenizer: Tokenizer, length: int, *, short: float = 0.1, name: str = ""
    ) -> None:
        """Set the stream of sentences, T, and the share of rows with a random shorter length."""
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
        """Return a random pair from row `index`'s section of its document."""
        first, middle, stop = self._chunk(index, rng)
        follows, other = self._read(middle, stop), self._elsewhere(first, middle, stop, rng)
        size = min(len(follows), len(other))
        not_next = int(rng.random() < 0.5)
        chosen = (other if not_next else follows)[:size]
        a, b = truncate(self._read(first, middle), chosen, self._room, rng)
        return self._row([(a, 0), (b, 1)]) | {"not_next": np.array(not_next, np.int32)}

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The first row of each document, then the number of rows: int64 [D + 1]."""
        runs = self._runs
        if len(runs.documents) < 3:
            raise DataError(f"{self.name} has one document; sentence pairs need at least 2")
        sizes = np.diff(runs.sums[runs.documents])
        rows = np.where(np.diff(runs.documents) > 1, np.maximum(1, sizes // self._room), 0)
        return np.concatenate([[0], np.cumsum(rows)])

    def _chunk(self, index: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Return the sentence indices at which A starts, B starts and B ends."""
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
        """Return, of eight random runs of another document, the one nearest in length to sentences middle … stop - 1.

        The nearest is longer about as often as shorter. If it were always longer, a random B would always be truncated
        and lose its final full stop, which would reveal the label.
        """
        runs = self._runs
        wanted, best = runs.size(middle, stop), (0, 0)
        mine, after = (int(number) for number in runs.documents[runs.owners[first] : runs.owners[first] + 2])
        for _ in range(8):
            start = int(rng.integers(len(runs.owners) - (after - mine)))
            start += (after - mine) * (start >= mine)  # skip the sentences of this document
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
    """RoBERTa's rows of whole sentences that may cross documents; a [SEP] marks each document's end.

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
        """Return a row that begins at a random sentence of row `index`'s section of the stream."""
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


def truncate(a: np.ndarray, b: np.ndarray, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Remove tokens from the longer text, at a random end each time, until both texts [n], [m] fit into `room`."""
    sizes = [len(a), len(b)]
    fronts = [0, 0]
    for _ in range(sum(sizes) - room):
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        fronts[longer] += int(rng.random() < 0.5)
    return a[fronts[0] : fronts[0] + sizes[0]], b[fronts[1] : fronts[1] + sizes[1]]


def _fill(runs: _Runs, start: int, wanted: int, low: int, high: int) -> tuple[int, int]:
    """Return the shortest run (start, stop) with `wanted` tokens; it starts earlier if the document ends too soon."""
    stop = int(np.searchsorted(runs.sums, runs.sums[start] + wanted))
    if stop > high:
        start = max(low, int(np.searchsorted(runs.sums, runs.sums[high] - wanted, side="right")) - 1)
        stop = high
    return start, max(stop, start + 1)
