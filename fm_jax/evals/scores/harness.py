"""A backend for EleutherAI's lm-evaluation-harness: log-likelihoods of texts, and generation.

Tokenisation follows the harness's own `hf` backend exactly, so the same weights get the same numbers: texts get the
tokenizer's frame of special tokens, special tokens spelt out in a task's texts are read as such, trailing spaces of a
context belong to the continuation, a text without a context follows the start token, and long texts are truncated on
the left.
Only `language_model` needs the harness's package. Source: lm_eval 0.4.13.

Dims: B batch, T time, C scored tokens, N new tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import DataError, NumericError
from fm_jax.core.types import Params
from fm_jax.data.text.tokenizer import Tokenizer

SMALLEST_BUCKET = 16
MAX_NEW_TOKENS = 256  # default for tasks that set no limit
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one option; the first wins


class Pair(NamedTuple):
    """Token ids of a context, and of the continuation to be scored."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Options:
    """Generation options; temperature 0 is greedy."""

    stop: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Prompts(NamedTuple):
    """Prompts of one shape, with generation options."""

    tokens: np.ndarray  # int32 [B, T], padded on the right
    lengths: np.ndarray  # int32 [B]
    seeds: np.ndarray  # int32 [B], one per prompt, independent of the batch
    options: Options
    stop: tuple[tuple[int, ...], ...]  # token sequences of stop strings: everything after them is ignored


Write = Callable[[Prompts], tuple[Any, Any]]
"""Prompts -> the new tokens [B, N], including the end token, and their number [B]."""


def encode(tokenizer: Tokenizer, text: str, *, frame: bool = True) -> list[int]:
    """Tokenise a text; it gets the tokenizer's frame of special tokens unless it begins with the start token."""
    if not frame or text.startswith(tokenizer.token(tokenizer.start_id)):
        return tokenizer.encode(text, special=True).tolist()
    return tokenizer.encode_pair(text, special=True).ids.tolist()


def split(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Return the ids of a context and its continuation.

    Both are tokenised as one text, which is then split after the number of tokens of the context alone.
    """
    if not context:
        first, ids = tokenizer.start_id, encode(tokenizer, continuation, frame=False)
        return Pair(ids[:1], ids[1:]) if ids[:1] == [first] else Pair([first], ids)
    kept = context.rstrip()
    before = encode(tokenizer, kept)
    return Pair(before, encode(tokenizer, context + continuation)[len(before) :])


def window(pair: Pair, max_length: int) -> list[int]:
    """Return the model's input: the last `max_length` tokens of the pair, without the very last token.

    Raises:
        DataError: an empty context or continuation, or a continuation longer than the model's input.
    """
    context, continuation = pair
    if not context or not continuation:
        empty = "context" if not context else "continuation"
        raise DataError(f"a request has an empty {empty}, so it cannot be scored; correct the task's texts")
    if len(continuation) > max_length:
        raise DataError(f"a continuation has {len(continuation)} tokens, but the model reads at most {max_length}")
    return (context + continuation)[-(max_length + 1) : -1]


def rolling(tokens: Sequence[int], first: int, max_length: int) -> list[Pair]:
    """Split a text into windows that score each token once.

    Every window except the last has one token of context (`first` for the first window). The last window is filled
    up with earlier tokens as context.
    """
    ids, pairs = list(tokens), list[Pair]()
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        context = ids[end - max_length - 1 : begin] if begin else [first]
        pairs.append(Pair(context, ids[begin:end]))
    return pairs


def score(model: nn.Module, params: Params, pairs: Sequence[Pair], *, batch_size: int = 16) -> list[tuple[float, bool]]:
    """Return each continuation's log-probability in nats, and whether greedy decoding would generate it.

    Pairs are sorted by length and padded to powers of two, so few shapes are compiled. Only the hidden states that
    predict scored tokens reach the head.

    Args:
        model: a decoder with `cfg.max_length` and the methods `hidden` and `logits`.
        params: its parameters.
        pairs: contexts and continuations; the result has their order.
        batch_size: rows per batch.

    Raises:
        DataError: as `window`, or an id outside the model's table.
        NumericError: a log-probability is not finite.
    """
    limit = model.cfg.max_length
    read = [window(pair, limit) for pair in pairs]
    _check_ids(pairs, model.cfg.vocab_size)
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for rows, chosen in _batches([len(ids) for ids in read], batch_size):
        tokens, lengths = _pad([read[row] for row in rows], limit)
        targets, counts = _pad([pairs[row].continuation for row in rows], limit, smallest=1)
        sums, greedy = jax.device_get(_score(model, params, tokens, lengths, targets, counts))
        for place, row in enumerate(chosen):
            if not np.isfinite(sums[place]):
                raise NumericError(f"the model's log-probability of request {row} is {sums[place]}; check its weights")
            scores[row] = float(sums[place]), bool(greedy[place])
    return scores


def _check_ids(pairs: Sequence[Pair], rows: int) -> None:
    """Refuse ids without a row in the model's table, which indexing on a device would clamp or make NaN."""
    for row, pair in enumerate(pairs):
        ids = np.array(pair.context + pair.continuation)
        if (wrong := np.flatnonzero((ids < 0) | (ids >= rows))).size:
            raise DataError(
                f"request {row} has token id {ids[wrong[0]]} at position {wrong[0]}; the model has rows 0 … {rows - 1}"
            )


@partial(jax.jit, static_argnums=0)
def _score(
    model: nn.Module, params: Params, tokens: jax.Array, lengths: jax.Array, targets: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the summed log-probability and "all greedy" of the last `counts` targets: [B, T], [B, C] -> [B], [B]."""
    hidden: Any = model.apply({"params": params}, tokens, method="hidden")
    index = jnp.arange(targets.shape[1])[None]
    places = jnp.clip((lengths - counts)[:, None] + index, 0, tokens.shape[1] - 1)
    states = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits: Any = model.apply({"params": params}, states, method="logits")
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    inside = index < counts[:, None]
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    greedy = jnp.argmax(logprobs, axis=-1) == targets
    return jnp.where(inside, chosen, 0.0).sum(axis=1), jnp.all(greedy | ~inside, axis=1)


def options(given: Mapping[str, Any]) -> Options:
    """Translate a task's `generation_kwargs`.

    Raises:
        DataError: an unsupported option, or sampling without a temperature.
    """
    left = dict(given)
    until = left.pop("until", None) or ()
    most = [value for name in _MOST if (value := left.pop(name, None)) is not None]
    drawn = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", None) or 0.0)
    if drawn and not temperature:
        raise DataError("a task sets do_sample without a temperature above 0; set a temperature, or remove do_sample")
    if drawn is False:
        temperature = 0.0
    # transformers' default for a missing top_k is 50
    filters = {"top_k": left.pop("top_k", 50) or 0, "top_p": left.pop("top_p", 1.0)} if temperature else {}
    penalty = left.pop("repetition_penalty", 1.0)
    if unknown := left.keys() - {"top_k", "top_p"}:  # these two have no effect on greedy decoding
        raise DataError(f"generation_kwargs has {sorted(unknown)[0]!r}, which is not supported; remove it")
    strings = (until,) if isinstance(until, str) else tuple(until)
    length = int(most[0]) if most else MAX_NEW_TOKENS
    return Options(strings, length, temperature, **filters, repetition_penalty=penalty)


def cut(text: str, stop: Sequence[str]) -> str:
    """Cut a text at each stop string in turn."""
    for string in stop:
        if string:
            text = text.split(string)[0]
    return text


def generate(
    write: Write, tokenizer: Tokenizer, asked: Sequence[tuple[str, Options]], max_length: int, *, batch_size: int = 16
) -> list[str]:
    """Return the generated text after each context, up to its first stop string or the end token.

    A context is truncated on the left if it and all new tokens do not fit into the model.

    Raises:
        DataError: the model has no room for the requested new tokens, or a context is empty.
    """
    texts, end = [""] * len(asked), tokenizer.token(tokenizer.end_id)
    ids = []
    for row, (context, how) in enumerate(asked):
        if not 0 < how.max_new_tokens < max_length:
            raise DataError(
                f"a task requests {how.max_new_tokens} new tokens, but the model's maximum length is {max_length}; "
                f"set max_gen_toks in its generation_kwargs to 1 … {max_length - 1}"
            )
        ids.append(encode(tokenizer, context)[how.max_new_tokens - max_length :])
        if not ids[row]:
            raise DataError(
                f"request {row} has an empty context, so nothing can be generated; correct the task's texts"
            )
    for how in dict.fromkeys(how for _, how in asked):
        mine = [row for row, (_, other) in enumerate(asked) if other == how]
        stop = _sequences(tokenizer, how.stop)
        for rows, chosen in _batches([len(ids[row]) for row in mine], batch_size):
            tokens, lengths = _pad([ids[mine[row]] for row in rows], max_length - how.max_new_tokens)
            seeds = np.array([mine[row] for row in rows], np.int32)
            new, counts = jax.device_get(write(Prompts(tokens, lengths, seeds, how, stop)))
            for place, row in enumerate(chosen):
                texts[mine[row]] = cut(tokenizer.decode(new[place, : counts[place]]), (*how.stop, end))
    return texts


def language_model(
    model: nn.Module, params: Params, tokenizer: Tokenizer, write: Write, *, batch_size: int = 16
) -> Any:
    """Return an `lm_eval.api.model.LM` for `lm_eval.simple_evaluate(model=…)`.

    Args:
        model: a decoder, as in `score`.
        params: its parameters.
        tokenizer: the tokenizer it was trained with.
        write: generates from prompts, for example with `generate/decode.py`.
        batch_size: rows per batch.
    """
    from lm_eval.api.model import LM

    first, limit = tokenizer.start_id, model.cfg.max_length

    class Model(LM):
        """Answers the harness's three kinds of request."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Score continuations: (context, continuation) -> (log-probability, whether it is the greedy choice)."""
            pairs = [split(tokenizer, *request.args) for request in requests]
            return score(model, params, pairs, batch_size=batch_size)

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Score whole texts: (text,) -> log-probability."""
            windows = [rolling(encode(tokenizer, *request.args), first, limit) for request in requests]
            scored = iter(score(model, params, [pair for pairs in windows for pair in pairs], batch_size=batch_size))
            return [sum((next(scored)[0] for _ in pairs), 0.0) for pairs in windows]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Continue texts: (context, generation_kwargs) -> text."""
            asked = [(request.args[0], options(request.args[1])) for request in requests]
            return generate(write, tokenizer, asked, limit, batch_size=batch_size)

    return Model()


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (padded rows, real rows), longest first; a batch is padded to a power of two with its last row."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        yield chosen + chosen[-1:] * (_power(len(chosen), batch_size) - len(chosen)), chosen


def _pad(rows: Sequence[Sequence[int]], limit: int, smallest: int = SMALLEST_BUCKET) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [B, T], padded on the right to a power of two or to `limit`, and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), _power(max(smallest, int(lengths.max())), limit)), np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded, lengths


def _power(count: int, limit: int) -> int:
    """Return the smallest power of two >= `count`, but at most `limit`."""
    return min(1 << (count - 1).bit_length(), limit)


def _sequences(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the stop strings as token sequences, without those that do not survive decoding."""
    sequences = {string: tuple(tokenizer.encode(string).tolist()) for string in stop if string}
    return tuple(ids for string, ids in sequences.items() if ids and string in tokenizer.decode(ids))
