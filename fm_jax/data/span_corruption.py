"""T5's pretraining task: spans are left out of a text, and the model writes them (Raffel et al. 2020, section 3.1.4).

Every left-out span leaves one sentinel, <extra_id_0> the first; the targets are each sentinel and its span. Inputs and
targets close with the end token, and the decoder reads the targets shifted right behind the padding token. As in the
authors' code the first span is never left out, the last always, and so no sentinel stands after the last one.
"""

from collections.abc import Mapping

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text import Row
from fm_jax.data.tokenizer import Tokenizer
from fm_jax.data.tokens import Tokens


def counts(length: int, *, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Return how many of `length` tokens are left out, and in how many spans."""
    if length < 2:
        raise DataError(f"a text of {length} tokens cannot lose a span; 2 are needed at least")
    noise = min(max(round(length * density), 1), length - 1)
    # Both kinds of spans are as many, and none is empty: at densities above a half the kept ones are the fewer.
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def noise_mask(length: int, rng: np.random.Generator, *, density: float = 0.15, mean_span: float = 3.0) -> np.ndarray:
    """Choose which tokens are left out, every way to divide them into spans being as likely: bool [length]."""
    noise, spans = counts(length, density=density, mean_span=mean_span)
    sizes = np.stack([_divide(length - noise, spans, rng), _divide(noise, spans, rng)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def corrupt(ids: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of a text [T] and its mask [T], both closed with the end token.

    Raises:
        DataError: more spans than sentinels.
    """
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(starts.sum())
    if spans > len(sentinels):
        raise DataError(f"{spans} spans need as many sentinels, the tokenizer has {len(sentinels)}; train it with more")
    marked = ids.copy()
    marked[starts] = sentinels[:spans]
    inputs = marked[~mask | starts]
    # A target's sentinel stands before the span's first token.
    targets = np.insert(ids[mask], np.flatnonzero(starts[mask]), sentinels[:spans])
    return np.append(inputs, ids.dtype.type(end_id)), np.append(targets, ids.dtype.type(end_id))


def lengths(inputs: int, *, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Return (tokens of text, tokens of targets) that fill `inputs` tokens: (568, 114) for 512.

    Raises:
        ConfigError: no text is so short.
    """

    def both(text: int) -> tuple[int, int]:
        noise, spans = counts(text, density=density, mean_span=mean_span)
        return text - noise + spans + 1, noise + spans + 1

    if inputs < both(2)[0]:
        raise ConfigError(f"corrupted inputs have at least {both(2)[0]} tokens, not {inputs}")
    text = 2
    while both(text + 1)[0] <= inputs:
        text += 1
    return text, both(text)[1]


class SpanCorruption:
    """Stretches of a stream without its end tokens: {"source", "source_length", "tokens", "targets", "weights"}.

    source [S], tokens and targets [T] are int32, source_length int32 [], weights float32 [T]. Spans are drawn anew at
    every visit; `source[index]` is always the same draw. The last stretch is shorter, and padded.
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
        """Take S, the share of tokens that are left out, and how many at once, on average."""
        if not (0 < density < 1 and mean_span >= 1):
            raise ConfigError(f"density must be in (0, 1) and mean_span at least 1, not {density} and {mean_span}")
        self._tokens, self._length, self._how = tokens, length, {"density": density, "mean_span": mean_span}
        self._text, self.target_length = lengths(length, **self._how)
        self._sentinels = np.array(tokenizer.sentinels, np.int32)
        if (spans := counts(self._text, **self._how)[1]) > len(self._sentinels):
            raise DataError(f"{spans} spans need as many sentinels, the tokenizer has {len(self._sentinels)}")
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
        """Return one stretch with spans left out."""
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
        found = self._tokens[start + first : stop + last]
        return found[found != self._end]


def _divide(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Divide items into parts, none empty, every way as likely: int [parts]."""
    cuts = 1 + np.sort(rng.permutation(items - 1)[: parts - 1])
    return np.diff(cuts, prepend=0, append=items)
