"""Baselines for language models: byte n-gram models and xz compression.

Interpolated Witten-Bell smoothing. With c(h, b) the count of byte b after context h, c(h) = Σ_b c(h, b), T(h) the
number of different bytes seen after h, and h' the context without its first byte:

    p(b | h) = (c(h, b) + T(h)·p(b | h')) / (c(h) + T(h)),   p(b | h) = p(b | h') where h was never seen,

starting from the uniform 1/256. Order n uses n-1 bytes of context; the first bytes of a text have less context.
Source: Witten and Bell 1991; Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques", section 2.4.

An n-gram is one unsigned integer, its first byte highest, so one sorted array is the whole table: the n-grams of a
context are adjacent. 8 MB of text, all orders up to 5: 1.5 s on one core and 0.2 GB; 15 MB: 3 s and 0.25 GB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fm_jax.core.errors import ConfigError, DataError, ResourceError
from fm_jax.evals.metrics import bits_per_byte

MAX_ORDER = 8  # bytes in a uint64
_CHUNK = 1 << 20  # bytes per block, so a large text needs no large arrays


@dataclass(frozen=True)
class _Table:
    """Counts of one order: G different n-grams in H different contexts."""

    grams: np.ndarray  # [G] unsigned, ascending
    counts: np.ndarray  # [G] int32, c(h, b)
    contexts: np.ndarray  # [H] unsigned, ascending
    totals: np.ndarray  # [H] int32, c(h)
    kinds: np.ndarray  # [H] int32, T(h)


@dataclass(frozen=True)
class NGram:
    """Counts of all n-grams up to `order` bytes of one training text."""

    tables: tuple[_Table, ...]

    @property
    def order(self) -> int:
        """The length of the longest n-grams."""
        return len(self.tables)


def fit(train: bytes, order: int) -> NGram:
    """Count the n-grams of a text, for every n from 1 to `order`.

    Raises:
        ConfigError: an order outside 1..8.
        DataError: the text is not bytes, is shorter than `order`, or has 2³¹ bytes or more.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ConfigError(f"n-gram order must be 1 to {MAX_ORDER}, not {order}")
    text = _array(train, "training text")
    if not order <= len(text) < 2**31:
        raise DataError(f"the training text has {len(text)} bytes; order {order} needs {order} to {2**31 - 1}")
    return NGram(tuple(_count(_codes(text, n)) for n in range(1, order + 1)))


def distribution(model: NGram, context: bytes) -> np.ndarray:
    """Return the probabilities float64 [256] of the byte after `context`; its last order-1 bytes are used."""
    tail = _array(context, "context", empty=True)[-(model.order - 1) :] if model.order > 1 else np.zeros(0, np.uint8)
    every = np.arange(256, dtype=np.uint64)
    p = np.full(256, 1 / 256)
    for n in range(1, min(model.order, len(tail) + 1) + 1):
        code = int.from_bytes(tail[len(tail) - (n - 1) :].tobytes(), "big")
        p = _interpolate(model.tables[n - 1], np.uint64(code << 8) | every, p)
    return p


def nll(model: NGram, text: bytes) -> np.ndarray:
    """Return the negative log-likelihood of a text in nats, float64 [order]; entry n-1 is that of order n."""
    array = _array(text, "text")
    sums = np.zeros(model.order)
    for start in range(0, len(array), _CHUNK):
        past = min(start, model.order - 1)
        window = array[start - past : start + _CHUNK]
        for n, p in enumerate(_probabilities(model, window)):
            sums[n] -= np.log(p[past:]).sum()
    return sums


def bits_per_byte_by_order(train: bytes, test: bytes, orders: Sequence[int] = (1, 2, 3, 5)) -> dict[int, float]:
    """Fit on the training text and return {order: bits per byte of the test text}.

    Raises:
        ConfigError: no order, or one outside 1..8.
        DataError: a text is empty, shorter than the largest order, or not bytes.
    """
    if not orders or min(orders) < 1:
        raise ConfigError(f"n-gram orders must be 1 to {MAX_ORDER}, not {list(orders)}")
    _array(test, "test text")  # check it before counting, which takes seconds
    sums = nll(fit(train, max(orders)), test)
    return {n: bits_per_byte(float(sums[n - 1]), len(test)) for n in orders}


def xz_bits_per_byte(train: bytes, test: bytes) -> float:
    """Return xz's bits per byte of test, given train: 8·(|xz(train+test)| - |xz(train)|) / |test|.

    |xz(x)| is the length of an .xz stream at preset 9 "extreme" (LZMA2: a Lempel-Ziv parse with an adaptive binary
    model, so it learns from both texts). The dictionary is as large as both texts, so test can refer to the first byte
    of train. The result is an actual code length, hence an upper bound: headers cancel, rounding adds at most 32 bits,
    and it means little below some kilobytes of test. Takes 1.3 s per MB of train and 11 times the texts in memory.

    Raises:
        ConfigError: this Python was built without lzma.
        DataError: a text is empty or not bytes.
        ResourceError: the texts exceed 1.5 GiB, xz's largest dictionary.
    """
    try:
        import lzma
    except ImportError as error:
        raise ConfigError(
            "this Python has no lzma module; install liblzma and rebuild Python, or omit the xz baseline"
        ) from error
    for name, text in (("training text", train), ("test text", test)):
        _array(text, name)
    size = len(train) + len(test)
    if size > 3 << 29:
        raise ResourceError(f"the texts have {size} bytes, more than xz's largest dictionary, {3 << 29}; use less text")
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(size, 4096)}]
    alone, both = (len(lzma.compress(x, filters=filters)) for x in (train, train + test))
    return 8 * (both - alone) / len(test)


def _array(text: bytes, name: str, empty: bool = False) -> np.ndarray:
    """View bytes as uint8 [N]."""
    if not isinstance(text, bytes | bytearray | memoryview):
        raise DataError(f"the {name} must be bytes, not {type(text).__name__}; encode it as UTF-8")
    if not len(text) and not empty:
        raise DataError(f"the {name} is empty; give at least one byte")
    return np.frombuffer(text, np.uint8)


def _codes(text: np.ndarray, n: int) -> np.ndarray:
    """Return the n-grams of a text [N] as unsigned integers [N-n+1] of the smallest sufficient type."""
    kind = np.dtype(np.uint16 if n <= 2 else np.uint32 if n <= 4 else np.uint64)  # fewer bytes sort faster
    codes = text[: len(text) - n + 1].astype(kind)
    for i in range(1, n):
        np.left_shift(codes, kind.type(8), out=codes)
        np.bitwise_or(codes, text[i : len(text) - n + 1 + i], out=codes)
    return codes


def _count(codes: np.ndarray) -> _Table:
    """Count equal n-grams [M] and their contexts (all bytes except the last). Sorts `codes` in place."""
    codes.sort()
    starts = _starts(codes)
    grams, counts = codes[starts], np.diff(starts, append=len(codes)).astype(np.int32)
    before = grams >> grams.dtype.type(8)
    first = _starts(before)
    totals = np.add.reduceat(counts, first, dtype=np.int32)
    return _Table(grams, counts, before[first], totals, np.diff(first, append=len(grams)).astype(np.int32))


def _starts(ascending: np.ndarray) -> np.ndarray:
    """Return the start index of each run of equal values in an ascending array [M]."""
    return np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))


def _probabilities(model: NGram, text: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each order p(byte | preceding bytes), float64 [N], of every byte of a text [N]."""
    p = np.full(len(text), 1 / 256)
    for n, table in enumerate(model.tables, start=1):
        p = p.copy()
        if len(text) >= n:  # otherwise no byte has n-1 bytes of context
            p[n - 1 :] = _interpolate(table, _codes(text, n), p[n - 1 :])
        yield p


def _interpolate(table: _Table, codes: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Return the probabilities [M] of n-grams [M] under one order, from `lower` [M] of the order below."""
    codes = codes.astype(table.grams.dtype)
    unique, back = np.unique(codes, return_inverse=True)  # ascending keys walk the table in order: 3 times faster
    gram, known = _find(table.grams, unique)
    context, seen = _find(table.contexts, unique >> unique.dtype.type(8))
    counts = np.where(known, table.counts[gram], 0)
    kinds = np.where(seen, table.kinds[context], 1)  # an unseen context: (0 + 1·lower) / (0 + 1)
    totals = np.where(seen, table.totals[context], 0)
    return (counts[back] + kinds[back] * lower) / (totals[back].astype(np.float64) + kinds[back])


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (index into `table` [G], whether the key is there) for each of keys [M]."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return index, table[index] == keys
