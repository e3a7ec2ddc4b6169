"""Sampling from next-token logits: penalties and filters with the names and meanings of Hugging Face `generate`.

Each filter is a pure function on logits [B, V] that sets removed tokens to -inf; `Config` composes them in the usual
order: repetition penalty, temperature, top-k, top-p, min-p.

Dims: B batch, T time, V vocabulary.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """Sampling options; the defaults sample from the model's own distribution."""

    temperature: float = 1.0  # 0: greedy, always the most probable token
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of most probable tokens with at least this total probability
    min_p: float = 0.0  # keep tokens with at least this fraction of the largest probability
    repetition_penalty: float = 1.0  # above 1: makes tokens of the prompt and the generated text less probable

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number, 0 for no limit, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be in [0, 1], not {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(
                f"repetition_penalty must be a positive number, 1 for none, not {self.repetition_penalty}"
            )


GREEDY = Config(temperature=0.0)


def temperature(logits: jax.Array, value: jax.Array | float) -> jax.Array:
    """Divide logits [B, V] by a positive temperature, after subtracting each row's maximum to prevent overflow."""
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / value


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keep the k largest logits of each row [B, V], and every token that ties with the k-th."""
    smallest = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Keep the nucleus of each row [B, V]: the most probable tokens up to and including the one that reaches `p`.

    Among equal logits the lower token id comes first. Source: Holtzman et al. 2020, section 3.1.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    kept = jnp.cumsum(ranked, axis=-1) - ranked < p  # compare the probability of all earlier tokens
    kept = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def min_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Keep the tokens of each row [B, V] whose probability is at least `p` times the largest one."""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def repetition_penalty(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Divide positive and multiply negative logits [B, V] of the tokens marked in `seen` [B, V].

    Source: Keskar et al. 2019 (CTRL), section 4.1, with Hugging Face's correction for negative logits.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_tokens(tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
    """Mark the tokens among the first lengths[b] of each row: [B, T], [B] -> bool [B, V]."""
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    nowhere = jnp.where(real, tokens, vocab_size)  # dropped by the scatter
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, nowhere].set(True, mode="drop")


def transform(logits: jax.Array, cfg: Config, seen: jax.Array | None = None) -> jax.Array:
    """Return the logits [B, V] that `sample` draws from; at temperature 0 only the repetition penalty applies."""
    if cfg.repetition_penalty != 1:
        if seen is None:
            raise ConfigError(f"repetition_penalty {cfg.repetition_penalty} needs `seen`, a [B, V] mask of past tokens")
        logits = repetition_penalty(logits, seen, cfg.repetition_penalty)
    if cfg.temperature == 0:
        return logits
    if cfg.temperature != 1:
        logits = temperature(logits, cfg.temperature)
    if cfg.top_k:
        logits = top_k(logits, cfg.top_k)
    if cfg.top_p < 1:
        logits = top_p(logits, cfg.top_p)
    if cfg.min_p:
        logits = min_p(logits, cfg.min_p)
    return logits


def row_keys(key: jax.Array, seeds: jax.Array) -> jax.Array:
    """Fold seeds [B] into a key: one key per row, so a row's randomness depends on its seed, not on its neighbours."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)


def sample(key: jax.Array | None, logits: jax.Array, cfg: Config, *, seen: jax.Array | None = None) -> jax.Array:
    """Choose one token per row: logits [B, V] -> int32 [B].

    Args:
        key: one key, or one per row (see `row_keys`); may be None at temperature 0.
        logits: the model's logits [B, V].
        cfg: sampling options, static under jit.
        seen: bool [B, V], the tokens that `repetition_penalty` applies to.
    """
    logits = transform(logits, cfg, seen)
    if cfg.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ConfigError(f"sampling at temperature {cfg.temperature} needs a key; give one, or set temperature 0")
    single = key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
    keys = row_keys(key, jnp.arange(logits.shape[0])) if single else key
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
