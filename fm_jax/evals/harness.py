"""What EleutherAI's lm-evaluation-harness asks of a decoder: how likely texts are, and how they go on.

What becomes of a text follows the harness's own `hf` backend to the token, so the same weights get the same numbers:
texts are framed by the tokenizer's own special tokens, spaces at a context's end belong to what follows, a text without
a context stands behind the start token, and what is too long loses its beginning. One thing differs on purpose: but for
a start token at the very beginning, the spelling of a special token within a text is text (`data/tokenizer.py`).
All of it but `language_model` works without that package. Source: lm_eval 0.4.13.

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
from fm_jax.data.tokenizer import Tokenizer

SMALLEST_BUCKET = 16
MAX_NEW_TOKENS = 256  # where a task says nothing
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one option, the first wins


class Pair(NamedTuple):
    """Token ids that are given, and those after them whose likelihood is asked for."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Options:
    """How a text is to be continued; greedily at temperature 0."""

    stop: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Prompts(NamedTuple):
    """Prompts of one shape, and how to continue them."""

    tokens: np.ndarray  # int32 [B, T], padded on the right
    lengths: np.ndarray  # int32 [B]
    seeds: np.ndarray  # int32 [B], each prompt's own, whatever its batch
    options: Options
    stop: tuple[tuple[int, ...], ...]  # sequences of tokens that spell a stop string: nothing after them is read


Write = Callable[[Prompts], tuple[Any, Any]]
"""Prompts -> the new tokens [B, N], the end token included, and how many of them are real [B]."""


def start_id(tokenizer: Tokenizer) -> int:
    """Return the token that stands before a text without a context; the end token where there is no start token."""
    try:
        return tokenizer.special("start")
    except DataError:
        return tokenizer.end_id


def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a text, with the tokenizer's special tokens unless it begins with the start token."""
    first = start_id(tokenizer)
    name = tokenizer.token(first)
    if text.startswith(name):
        return [first, *tokenizer.encode(text[len(name) :]).tolist()]
    return (tokenizer.encode_pair(text).ids if special else tokenizer.encode(text)).tolist()


def split(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Return the ids of a context and of what follows it.

    Both are encoded as one text, which is then cut where the context alone would end: no token is made of both.
    """
    if not context:
        first, ids = start_id(tokenizer), encode(tokenizer, continuation, special=False)
        return Pair(ids[:1], ids[1:]) if ids[:1] == [first] else Pair([first], ids)
    kept = context.rstrip()
    before = encode(tokenizer, kept)
    return Pair(before, encode(tokenizer, context + continuation)[len(before) :])


def window(pair: Pair, max_length: int) -> list[int]:
    """Return what the model reads, at most its last `max_length` tokens: all but the very last one.

    Raises:
        DataError: nothing before, nothing to score, or more to score than the model can read.
    """
    context, continuation = pair
    if not context or not continuation:
        what = "context" if not context else "continuation"
        raise DataError(f"a request has a {what} of no tokens, so nothing can be scored; mend the task's texts")
    if len(continuation) > max_length:
        raise DataError(f"a continuation has {len(continuation)} tokens, and the model reads {max_length}")
    return (context + continuation)[-(max_length + 1) : -1]


def rolling(tokens: Sequence[int], first: int, max_length: int) -> list[Pair]:
    """Cut a text into windows that score each token once, with as much before it as its window has room for.

    All windows but the last have one token of context, `first` in the beginning; the last one reaches back until it
    is full.
    """
    ids, pairs = list(tokens), list[Pair]()
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        context = ids[end - max_length - 1 : begin] if begin else [first]
        pairs.append(Pair(context, ids[begin:end]))
    return pairs


def score(model: nn.Module, params: Params, pairs: Sequence[Pair], *, batch_size: int = 16) -> list[tuple[float, bool]]:
    """Return each continuation's log-probability in nats, and whether the model would have written it greedily.

    Pairs are sorted by length and padded to powers of two, so few shapes are compiled; only the states before the
    scored tokens reach the head.

    Args:
        model: a decoder with `cfg.max_length` and the methods `hidden` and `logits`.
        params: its parameters.
        pairs: in any order, which the result keeps.
        batch_size: rows scored at once.

    Raises:
        DataError: as `window`.
        NumericError: a log-probability that is not finite.
    """
    limit = model.cfg.max_length
    read = [window(pair, limit) for pair in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for rows, chosen in _batches([len(ids) for ids in read], batch_size):
        tokens, lengths = _pad([read[row] for row in rows], limit)
        targets, counts = _pad([pairs[row].continuation for row in rows], limit, smallest=1)
        sums, greedy = jax.device_get(_score(model, params, tokens, lengths, targets, counts))
        for place, row in enumerate(chosen):
            if not np.isfinite(sums[place]):
                raise NumericError(f"the model gave the log-probability {sums[place]} to request {row}")
            found[row] = float(sums[place]), bool(greedy[place])
    return found


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
        DataError: an option that is not known here, or a draw without a temperature.
    """
    left = dict(given)
    until = left.pop("until", None) or ()
    most = [value for name in _MOST if (value := left.pop(name, None)) is not None]
    drawn = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", None) or 0.0)
    if drawn and not temperature:
        raise DataError("a task sets do_sample without a temperature above 0; give it one, or leave do_sample out")
    if drawn is False:
        temperature = 0.0
    # what is left out has transformers' default, which filters: the 50 most probable tokens
    filters = {"top_k": left.pop("top_k", 50) or 0, "top_p": left.pop("top_p", 1.0)} if temperature else {}
    penalty = left.pop("repetition_penalty", 1.0)
    if unknown := left.keys() - {"top_k", "top_p"}:  # greedy, these two change nothing
        raise DataError(f"generation_kwargs has {sorted(unknown)[0]!r}, which is not supported; remove it")
    strings = (until,) if isinstance(until, str) else tuple(until)
    length = int(most[0]) if most else MAX_NEW_TOKENS
    return Options(strings, length, temperature, **filters, repetition_penalty=penalty)


def cut(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop string, each of them looked for in what the one before it has left."""
    for string in stop:
        if string:
            text = text.split(string)[0]
    return text


def go_on(
    write: Write, tokenizer: Tokenizer, asked: Sequence[tuple[str, Options]], max_length: int, *, batch_size: int = 16
) -> list[str]:
    """Return what follows each context, up to its first stop string or the end token.

    A context loses its beginning where the model has not room for it and for all new tokens.

    Raises:
        DataError: more new tokens asked for than the model has room for, or a context of no tokens.
    """
    texts, end = [""] * len(asked), tokenizer.token(tokenizer.end_id)
    ids = []
    for row, (context, how) in enumerate(asked):
        if not 0 < how.max_new_tokens < max_length:
            raise DataError(
                f"a task asks for {how.max_new_tokens} new tokens, and the model reads {max_length} in all; set "
                f"max_gen_toks in its generation_kwargs, from 1 to {max_length - 1}"
            )
        ids.append(encode(tokenizer, context)[how.max_new_tokens - max_length :])
        if not ids[row]:
            raise DataError(f"request {row} has a context of no tokens, so nothing can follow; mend the task's texts")
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
    """Return an `lm_eval.api.model.LM`, to be given to `lm_eval.simple_evaluate(model=…)`.

    Args:
        model: as in `score`.
        params: its parameters.
        tokenizer: the one it was trained with.
        write: continues prompts, such as `generate/decode.py` does.
        batch_size: rows worked on at once.
    """
    from lm_eval.api.model import LM

    first, limit = start_id(tokenizer), model.cfg.max_length

    class Model(LM):
        """Answers the harness's three kinds of request."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Score continuations: (context, continuation) -> (log-probability, whether it is the greedy one)."""
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
            return go_on(write, tokenizer, asked, limit, batch_size=batch_size)

    return Model()


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (rows, rows that count), longest first; a batch is filled up to a power of two with its last row."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        yield chosen + chosen[-1:] * (_power(len(chosen), batch_size) - len(chosen)), chosen


def _pad(rows: Sequence[Sequence[int]], limit: int, smallest: int = SMALLEST_BUCKET) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [B, T], padded on the right to a power of two or `limit`, and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), _power(max(smallest, int(lengths.max())), limit)), np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded, lengths


def _power(count: int, limit: int) -> int:
    """Return the smallest power of two that holds `count`, or `limit` where that is less."""
    return min(1 << (count - 1).bit_length(), limit)


def _sequences(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the stop strings as tokens, without those that read otherwise once they are decoded."""
    found = {string: tuple(tokenizer.encode(string).tolist()) for string in stop if string}
    return tuple(ids for string, ids in found.items() if ids and string in tokenizer.decode(ids))
