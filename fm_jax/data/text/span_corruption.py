"""Span corruption, T5's pretraining task: predict the spans removed from a text (Raffel et al. 2020, section 3.1.4).

Each removed span is replaced by one sentinel, starting with <extra_id_0>; the targets are each sentinel and its span.
Inputs and targets end with the end token. The decoder's input is the targets shifted right, with the padding token as
the start token. As in the authors' code, a text starts with a kept span and ends with a removed one, so the targets
have no closing sentinel.
"""

from collections.abc import Mapping

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text.layout import Row
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.data.text.tokens import Tokens


def counts(length: int, *, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Return (removed tokens, removed spans) for a text of `length` tokens."""
    if length < 2:
        raise DataError(f"a text of {length} tokens is too short for span corruption; use at least 2")
    noise = min(max(round(length * density), 1), length - 1)
    # Removed and kept spans are equal in number and not empty; above density 0.5 the kept tokens are the limit.
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def noise_mask(length: int, rng: np.random.Generator, *, density: float = 0.15, mean_span: float = 3.0) -> np.ndarray:
    """Choose the removed tokens, uniformly over all divisions into spans: bool [length]."""
    noise, spans = counts(length, density=density, mean_span=mean_span)
    sizes = np.stack([_divide(length - noise, spans, rng), _divide(noise, spans, rng)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def corrupt(ids: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs [S] and targets [U] of a text [T] and its mask [T], both ending with the end token.

    Raises:
        DataError: more spans than sentinels.
    """
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(starts.sum())
    if spans > len(sentinels):
        raise DataError(
            f"{spans} spans need {spans} sentinels, but the tokenizer has {len(sentinels)}; train it with more"
        )
    marked = ids.copy()
    marked[starts] = sentinels[:spans]
    inputs = marked[~mask | starts]
    # Each sentinel precedes its span's first token.
    targets = np.insert(ids[mask], np.flatnonzero(starts[mask]), sentinels[:spans])
    return np.append(inputs, ids.dtype.type(end_id)), np.append(targets, ids.dtype.type(end_id))


def lengths(inputs: int, *, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Return (length of the text, length of the targets) for corrupted inputs of length `inputs`: (568, 114) for 512.

    Raises:
        ConfigError: `inputs` is too short for any text.
    """

    def both(text: int) -> tuple[int, int]:
        noise, spans = counts(text, density=density, mean_span=mean_span)
        return text - noise + spans + 1, noise + spans + 1

    if inputs < both(2)[0]:
        raise ConfigError(f"span corruption needs inputs of at least {both(2)[0]} tokens, not {inputs}")
    text = 2
    while both(text + 1)[0] <= inputs:
        text += 1
    return text, both(text)[1]


class SpanCorruption:
    """Consecutive pieces of a stream, corrupted: {"source", "source_length", "tokens", "targets", "weights"}.

    source [S], tokens and targets [T] are int32, source_length int32 [], weights float32 [T]. End tokens of the stream
    are dropped. Spans are random at every visit; `source[index]` is always the same draw. The last piece is padded.
    """

    def __init__(
        self,
        tokens: Tokens,
        tokenizer: Tokenizer,
        length: int,
        *,
        density: float = 0.15,
        mean_span: float = 3.0,
        name: str = "",
    ) -> None:
        """Set S, the share of removed tokens, and the mean length of a removed span."""
        if not (0 < density < 1 and mean_span >= 1):
            raise ConfigError(f"density must be in (0, 1) and mean_span at least 1, not {density} and {mean_span}")
        self._tokens, self._length, self._how = tokens, length, {"density": density, "mean_span": mean_span}
        self._text, self.target_length = lengths(length, **self._how)
        self._sentinels = np.array(tokenizer.sentinels, np.int32)
        if (spans := counts(self._text, **self._how)[1]) > len(self._sentinels):
            raise DataError(
                f"rows of {length} tokens need {spans} sentinels, but the tokenizer has {len(self._sentinels)}; "
                "train it with more"
            )
        self._end, self._pad = tokenizer.end_id, tokenizer.pad_id
        self._starts = np.asarray(tokens.starts) - np.arange(len(tokens.starts))  # without end tokens
        self.name = name or f"corrupted spans of {tokens.folder}"
        self.fingerprint = f"spans-{length}-{density:g}-{mean_span:g}-{tokens.fingerprint}-{tokenizer.fingerprint}"
        self.limits: Mapping[str, int] = dict.fromkeys(("source", "tokens", "targets"), tokens.vocab_size)

    def __len__(self) -> int:
        whole, rest = divmod(int(self._starts[-1]), self._text)
        return whole + (rest > 1)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return piece `index` with random spans removed."""
        ids = self._read(index * self._text, min((index + 1) * self._text, int(self._starts[-1])))
        inputs, targets = corrupt(ids, noise_mask(len(ids), rng, **self._how), self._sentinels, self._end)
        row: Row = {name: np.full(self.target_length, self._pad, np.int32) for name in ("tokens", "targets")}
        row["source"] = np.full(self._length, self._pad, np.int32)
        row["source"][: len(inputs)] = inputs
        row["targets"][: len(targets)], row["tokens"][1 : len(targets)] = targets, targets[:-1]
        weights = (np.arange(self.target_length) < len(targets)).astype(np.float32)
        return row | {"source_length": np.array(len(inputs), np.int32), "weights": weights}

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start … stop - 1 of the stream without its end tokens."""
        first, last = (int(np.searchsorted(self._starts, place, side="right")) for place in (start, stop - 1))
        ids = self._tokens[start + first : stop + last]
        return ids[ids != self._end]


def _divide(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Divide items into parts of at least 1, uniformly over all divisions: int [parts]."""
    cuts = 1 + np.sort(rng.permutation(items - 1)[: parts - 1])
    return np.diff(cuts, prepend=0, append=items)
