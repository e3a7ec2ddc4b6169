"""Text generation from strings: tokenise, generate in a few compiled shapes, cut at stop strings."""

from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np

from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.core.types import Params
from fm_jax.generate.decode import Ids, Output, generate
from fm_jax.generate.sample import GREEDY, Config
from fm_jax.hub.generation import Generation
from fm_jax.layers.cache import Context
from fm_jax.layers.stack import unstacked

SMALLEST_BUCKET = 16
Prompt = str | Sequence[int] | np.ndarray
"""A text, or the token ids of one (`Tokenizer.encode_chat`)."""


class Tokenizer(Protocol):
    """The methods that generation needs; `data/text/tokenizer.py` has them."""

    @property
    def end_id(self) -> int:
        """Return the id that ends a text."""

    def encode(self, text: str) -> Any:
        """Return the ids of a text."""

    def decode(self, ids: Any) -> str:
        """Return the text of ids."""


def text(
    model: nn.Module,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    context: Context = None,
    cfg: Config = GREEDY,
    key: jax.Array | None = None,
    eos_id: Ids = None,
    generation: Generation | None = None,
    start_id: int | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
) -> list[str]:
    """Return the generated text after each prompt, without the prompt, the end token and the stop string.

    Prompts are sorted by length and run in batches of `batch_size`. Padded lengths are powers of two, so only few
    shapes are compiled. A prompt's text depends on the key and its index in `prompts`, not (except for rounding) on its
    batch.

    Args:
        model: as in `decode.generate`.
        params: its parameters.
        tokenizer: has `encode`, `decode` and `end_id`.
        prompts: texts (special tokens in them are text) or token ids, none empty unless there is a `start_id`.
        max_new_tokens: limit per prompt.
        context: as in `decode.generate`, one row per prompt. For an encoder-decoder, a prompt is the start of the
            output ("" for none), after `start_id` (T5's is 0).
        cfg: sampling options; greedy by default.
        key: random key, required unless temperature is 0.
        eos_id: token or tokens that end a text; () for none, and by default those of `ends`.
        generation: what the model's checkpoint states; only its end tokens are used.
        start_id: token before every prompt, for a model whose training documents begin with one.
        stop: strings that end a text; it is cut at the first. If a stop string is tokenised differently within the
            text, generation continues after it, which only costs time.
        batch_size: rows per batch.

    Raises:
        ConfigError: a prompt is empty, too long, or has an id outside the model's table; or a wrong number of rows.
        NumericError: a log-probability is not finite.
    """
    _check_options(batch_size, stop)
    closing = ends(tokenizer, generation) if eos_id is None else eos_id
    ids = _encode(tokenizer, prompts, start_id)
    _check(ids, prompts, max_new_tokens, model.cfg.max_length, model.cfg.vocab_size)
    beside = _rows(context, len(prompts))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cfg": cfg, "key": key, "eos_id": closing}
    options["stop"] = tuple(tuple(map(int, tokenizer.encode(string))) for string in stop)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts, params = [""] * len(ids), unstacked(params)  # unstacked once for all batches
    for chosen in (order[first : first + batch_size] for first in range(0, len(order), batch_size)):
        rows = chosen + [chosen[-1]] * (_power(len(chosen), batch_size) - len(chosen))
        padded, lengths = _pad([ids[row] for row in rows], model.cfg.max_length - max_new_tokens)
        options |= {"context": {name: array[rows] for name, array in beside.items()}, "seeds": np.array(rows)}
        out = jax.device_get(generate(model, params, padded, lengths, **options))
        for place, row in enumerate(chosen):
            texts[row] = _cut(tokenizer, ids[row], _row(out, place, prompts[row]), closing, stop)
    return texts


def _check_options(batch_size: int, stop: Sequence[str]) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    if "" in stop:
        raise ConfigError("a stop string is empty; remove it")


def ends(tokenizer: Tokenizer, generation: Generation | None) -> tuple[int, ...]:
    """Return the tokens that end a text: those that the checkpoint states, which may be none, or the tokenizer's."""
    stated = (generation.ids, generation.settings or {}) if generation else ()
    if generation and any("eos_token_id" in names for names in stated):
        return generation.end_ids
    return (tokenizer.end_id,)


def _encode(tokenizer: Tokenizer, prompts: Sequence[Prompt], start_id: int | None) -> list[np.ndarray]:
    """Return the ids of each prompt, after the start token."""
    start = [] if start_id is None else [start_id]
    given = (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    return [np.array([*start, *ids], np.int32) for ids in given]


def _power(count: int, limit: int) -> int:
    """Return the smallest power of two >= `count`, but at most `limit`."""
    return min(1 << (count - 1).bit_length(), limit)


def _pad(ids: Sequence[np.ndarray], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts [B, T], padded on the right to a power of two or to `limit`, and their lengths [B]."""
    lengths = np.array([len(row) for row in ids], np.int32)
    padded = np.zeros((len(ids), _power(max(SMALLEST_BUCKET, int(lengths.max())), limit)), np.int32)
    for place, row in enumerate(ids):
        padded[place, : len(row)] = row
    return padded, lengths


def _check(
    ids: Sequence[np.ndarray], prompts: Sequence[Prompt], max_new_tokens: int, max_length: int, rows: int
) -> None:
    for index, tokens in enumerate(ids):
        if not tokens.size:
            raise ConfigError(f"prompt {index} ({prompts[index]!r}) has no tokens; give a start_id")
        if (wrong := np.flatnonzero((tokens < 0) | (tokens >= rows))).size:
            raise ConfigError(
                f"prompt {index} has token id {tokens[wrong[0]]} at position {wrong[0]}; the model has rows"
                f" 0 … {rows - 1}"
            )
        if tokens.size + max_new_tokens > max_length:
            raise ConfigError(
                f"prompt {index} has {tokens.size} tokens; with max_new_tokens {max_new_tokens} that is"
                f" {tokens.size + max_new_tokens}, more than max_length {max_length}; shorten one of them"
            )


def _rows(context: Context, count: int) -> dict[str, np.ndarray]:
    """Return the context as NumPy arrays; refuse arrays without `count` rows."""
    arrays = {name: np.asarray(array) for name, array in (context or {}).items()}
    if wrong := [f"{name!r} has {len(array)}" for name, array in arrays.items() if len(array) != count]:
        raise ConfigError(f"{count} prompts need {count} rows of context, but {', '.join(wrong)}")
    return arrays


def _row(out: Output, place: int, prompt: Prompt) -> np.ndarray:
    count = int(out.lengths[place])
    if not np.isfinite(out.logprobs[place, :count]).all():
        raise NumericError(f"the model's log-probabilities after {prompt[:40]!r} are not finite; check its weights")
    return np.asarray(out.tokens[place, :count])


def _cut(
    tokenizer: Tokenizer, prompt: np.ndarray, new: np.ndarray, ends: int | tuple[int, ...], stop: Sequence[str]
) -> str:
    """Decode the new tokens together with the prompt's and cut at the first stop string."""
    if new.size and np.isin(new[-1], ends):
        new = new[:-1]
    # Decoding the new tokens alone can lose a leading space or split a character.
    before, whole = tokenizer.decode(prompt.tolist()), tokenizer.decode([*prompt.tolist(), *new.tolist()])
    written = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new.tolist())
    ends_at = [written.find(string) for string in stop if string in written]
    return written[: min(ends_at)] if ends_at else written
