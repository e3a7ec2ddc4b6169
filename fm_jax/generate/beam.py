"""Beam search with a key-value cache; option names and meanings are those of Hugging Face `generate`.

At every step the `2 * num_beams` best extensions of a row's beams are taken (more with several end tokens), so that at
least `num_beams` of them are unfinished. A finished extension among the best `num_beams` enters the pool with score
`sum of log-probabilities / length ** length_penalty`; the best unfinished ones are the next beams.

Dims: B batch, K num_beams, N max_new_tokens, V vocabulary, C candidates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.generate.decode import Ids, InitCache, advance, check, prefill
from fm_jax.layers.cache import Context, init_cache, map_rows
from fm_jax.layers.stack import unstacked


@dataclass(frozen=True)
class Config:
    """Beam width, length penalty and stopping rule."""

    num_beams: int = 4
    length_penalty: float = 1.0  # power of the length that divides the score: above 0 favours longer texts
    early_stopping: bool | Literal["never"] = False
    """When a row's search ends. true: when num_beams texts are finished; false: when no beam beats the worst of them at
    its current length (may miss a better long text); never: when no beam could beat it at any length."""

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if isinstance(self.num_beams, bool) or not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ConfigError(f"num_beams must be a whole number of at least 1, not {self.num_beams}")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty must be a number, 0 for none, not {self.length_penalty}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(f'early_stopping must be true, false or "never", not {self.early_stopping!r}')


class Output(struct.PyTreeNode):
    """The result of `search`: each row's texts, the best first.

    Attributes:
        tokens: int32 [B, K, N], new tokens including the end token, then `pad_id`.
        lengths: int32 [B, K], number of new tokens; 0 for a missing text.
        scores: float32 [B, K], sum of log-probabilities / length ** length_penalty; -inf for a missing text.
        logprobs: float32 [B, K, N], each token's log-probability, then 0.
        finished: bool [B, K], True if the text ended with an end token, False if it reached max_new_tokens.
        steps: int32 [], iterations of the loop, each one token for all beams (the first comes from the prefill).
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    logprobs: jax.Array
    finished: jax.Array
    steps: jax.Array


def search(
    model: nn.Module,
    params: Params,
    prompts: ArrayLike,
    lengths: ArrayLike,
    *,
    max_new_tokens: int,
    context: Context = None,
    cfg: Config = Config(),
    eos_id: Ids = None,
    pad_id: int = 0,
    init_cache: InitCache = init_cache,
) -> Output:
    """Return the `num_beams` best continuations of each prompt [B, T]; arguments as in `decode.generate`.

    Raises:
        ConfigError: T + N exceeds the model's max_length, a length or a token id is out of range, or a context has
            another batch.
    """
    eos = check(model, prompts, lengths, max_new_tokens, eos_id, context)
    arrays = unstacked(params), jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32), dict(context or {})
    return _search(model, max_new_tokens, cfg, eos, pad_id, init_cache, *arrays)


class _Beams(NamedTuple):
    """Texts of each row, [B, K or C, …]; score -inf marks an empty entry."""

    tokens: jax.Array  # [B, K, N]
    lengths: jax.Array  # [B, K]
    scores: jax.Array  # [B, K], raw sums in beams, divided by the length penalty in the pool
    logprobs: jax.Array  # [B, K, N]
    finished: jax.Array  # [B, K]


class _State(NamedTuple):
    """The loop's carry; `step` tokens have been chosen."""

    step: jax.Array
    steps: jax.Array
    beams: _Beams
    pool: _Beams
    searching: jax.Array  # [B] bool; once false, the row's pool no longer changes
    cache: Any


@partial(jax.jit, static_argnums=range(6))
def _search(
    model: nn.Module,
    count: int,
    cfg: Config,
    eos: tuple[int, ...],
    pad_id: int,
    init_cache: InitCache,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    context: Mapping[str, jax.Array],
) -> Output:
    (batch, time), width = prompts.shape, cfg.num_beams
    cache = unstacked(init_cache(model, params, batch, time + count, context))
    logits, cache = prefill(model, params, cache, prompts, lengths, context)
    logits = jnp.repeat(logits, width, axis=0)  # [B·K, V], a row's beams side by side
    cache = map_rows(lambda leaf, axis: jnp.repeat(leaf, width, axis=axis), cache)
    starts = jnp.repeat(lengths, width)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < count) & jnp.any(state.searching)

    def body(state: _State) -> _State:
        last = jax.lax.dynamic_index_in_dim(state.beams.tokens, state.step - 1, axis=2, keepdims=False)
        logits, cache = advance(model, params, state.cache, last.reshape(-1), starts + state.step - 1)
        return _extend(state._replace(cache=cache, steps=state.steps + 1), logits, cfg, eos, count)

    blank = _Beams(
        tokens=jnp.full((batch, width, count), pad_id, jnp.int32),
        lengths=jnp.zeros((batch, width), jnp.int32),
        scores=jnp.full((batch, width), -jnp.inf),
        logprobs=jnp.zeros((batch, width, count)),
        finished=jnp.zeros((batch, width), bool),
    )
    # Before the first token all beams of a row are equal: only one of them may be extended.
    beams = blank._replace(scores=blank.scores.at[:, 0].set(0.0))
    state = _State(jnp.int32(0), jnp.int32(0), beams, blank, jnp.ones(batch, bool), cache)
    state = jax.lax.while_loop(unfinished, body, _extend(state, logits, cfg, eos, count))
    pool = state.pool
    real = (jnp.arange(count)[None, None] < pool.lengths[..., None]) & jnp.isfinite(pool.scores)[..., None]
    return Output(
        tokens=jnp.where(real, pool.tokens, pad_id),
        lengths=jnp.where(jnp.isfinite(pool.scores), pool.lengths, 0),
        scores=pool.scores,
        logprobs=jnp.where(real, pool.logprobs, 0.0),
        finished=pool.finished & jnp.isfinite(pool.scores),
        steps=state.steps,
    )


def _extend(state: _State, logits: jax.Array, cfg: Config, eos: tuple[int, ...], count: int) -> _State:
    """Extend every beam by one token: the best unfinished ones remain beams, the best finished ones enter the pool."""
    candidates, parents = _candidates(state, logits, max(2, 1 + len(eos)) * cfg.num_beams, eos)
    length = state.step + 1
    # At the last step every candidate ends (max_new_tokens); only the best num_beams may enter the pool.
    ended = (candidates.finished | (length == count)) & (jnp.arange(parents.shape[1]) < cfg.num_beams)[None]
    divided = candidates.scores / length.astype(jnp.float32) ** cfg.length_penalty
    entering = jnp.where(ended & state.searching[:, None], divided, -jnp.inf)
    together = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1), state.pool, candidates._replace(scores=entering)
    )
    pool = _best(together, together.scores, cfg.num_beams)[0]
    beams, kept = _best(candidates, jnp.where(candidates.finished, -jnp.inf, candidates.scores), cfg.num_beams)
    parents = jnp.take_along_axis(parents, kept, axis=1)
    rows = (jnp.arange(parents.shape[0])[:, None] * cfg.num_beams + parents).reshape(-1)
    cache = map_rows(lambda leaf, axis: jnp.take(leaf, rows, axis=axis), state.cache)
    searching = state.searching & _improvable(beams, pool, length, cfg, count)
    return _State(length, state.steps, beams, pool, searching, cache)


def _candidates(state: _State, logits: jax.Array, number: int, eos: tuple[int, ...]) -> tuple[_Beams, jax.Array]:
    """Return the best one-token extensions of a row's beams, best first, and the beam [B, C] that each extends."""
    beams, (batch, width) = state.beams, state.beams.scores.shape
    logprobs = jax.nn.log_softmax(logits).reshape(batch, width, -1)
    vocab = logprobs.shape[-1]
    totals = (beams.scores[..., None] + logprobs).reshape(batch, -1)
    scores, chosen = jax.lax.top_k(totals, min(number, width * vocab))
    parents, token = chosen // vocab, (chosen % vocab).astype(jnp.int32)
    taken = jax.tree.map(partial(_take, index=parents), beams)
    return _Beams(
        tokens=taken.tokens.at[:, :, state.step].set(token),
        lengths=jnp.full_like(taken.lengths, state.step + 1),
        scores=scores,
        logprobs=taken.logprobs.at[:, :, state.step].set(_take(logprobs.reshape(batch, -1), chosen)),
        finished=jnp.isin(token, jnp.array(eos, jnp.int32)),
    ), parents


def _improvable(beams: _Beams, pool: _Beams, length: jax.Array, cfg: Config, count: int) -> jax.Array:
    """Return which rows could still improve their pool: bool [B]."""
    # The sum of log-probabilities only falls as a text grows, so with a penalty > 0, dividing by the largest length
    # gives an upper bound of the final score.
    attained = jnp.int32(count) if cfg.early_stopping == "never" and cfg.length_penalty > 0 else length
    best = jnp.max(beams.scores, axis=1) / attained.astype(jnp.float32) ** cfg.length_penalty
    full = jnp.all(jnp.isfinite(pool.scores), axis=1)
    if cfg.early_stopping is True:
        return jnp.isfinite(best) & ~full
    return best > jnp.min(pool.scores, axis=1)


def _best(beams: _Beams, scores: jax.Array, number: int) -> tuple[_Beams, jax.Array]:
    """Return the beams with the highest `scores` [B, C], with these as their scores, and their indices [B, K]."""
    scores, index = jax.lax.top_k(scores, min(number, scores.shape[1]))
    return jax.tree.map(partial(_take, index=index), beams)._replace(scores=scores), index


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    """Pick along axis 1: [B, C, …], [B, K] -> [B, K, …]."""
    return jnp.take_along_axis(values, index.reshape(index.shape + (1,) * (values.ndim - 2)), axis=1)
