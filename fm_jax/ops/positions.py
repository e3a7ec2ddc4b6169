"""Position encodings without parameters."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021) and methods to extend them to a longer context."""

    base: float = 10_000.0
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0  # context length divided by `original_length`
    original_length: int = 8192  # context length of the original training
    low_frequency: float = 1.0  # llama3: dimensions with fewer turns are scaled by the full factor; yarn: beta_slow
    high_frequency: float = 4.0  # llama3: dimensions with more turns are not scaled; yarn: beta_fast
    truncate: bool = True  # yarn: move the ends of the ramp outwards to whole dimensions
    attention_factor: float = 0.0  # yarn, longrope: factor of cos and sin; 0: the method's own (see `magnitude`)
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the K/2 frequencies in texts up to original_length
    long_factors: tuple[float, ...] = ()  # longrope: the same in longer texts

    def __post_init__(self) -> None:
        """Check that values are in range and belong to the method."""
        if self.base <= 1 or self.factor < 1:
            raise ConfigError(f"rope needs base > 1 and factor ≥ 1, not base {self.base} and factor {self.factor}")
        if self.original_length < 2 or self.attention_factor < 0:
            raise ConfigError(
                f"rope needs original_length ≥ 2 and attention_factor ≥ 0, not original_length {self.original_length} "
                f"and attention_factor {self.attention_factor}"
            )
        low, high = self.low_frequency, self.high_frequency
        if (self.scaling == "llama3" and high <= low) or (self.scaling == "yarn" and min(low, high) <= 0):
            rule = "be below high_frequency" if self.scaling == "llama3" else "be above 0, and high_frequency too"
            raise ConfigError(f"{self.scaling} rope's low_frequency must {rule}, not {low} and {high}")
        if self.attention_factor and self.scaling not in ("yarn", "longrope"):
            raise ConfigError(
                f"rope's attention_factor is {self.attention_factor}, but {self.scaling!r} has none; set it to 0"
            )
        if any(factor <= 0 for factor in (*self.short_factors, *self.long_factors)):
            raise ConfigError(
                f"rope's short_factors {self.short_factors} and long_factors {self.long_factors} must be positive"
            )


def magnitude(cfg: Rope) -> float:
    """Return the factor of cos and sin: the config's, or else the method's own.

    yarn: Peng et al. 2023, eq. 22, 0.1 ln(factor) + 1. longrope: Ding et al. 2024, section 3.3,
    sqrt(1 + ln(factor) / ln(original_length)). The other methods have none.
    """
    if cfg.attention_factor:
        return cfg.attention_factor
    if cfg.scaling == "yarn":
        return 0.1 * math.log(cfg.factor) + 1
    if cfg.scaling == "longrope" and cfg.factor > 1:
        return math.sqrt(1 + math.log(cfg.factor) / math.log(cfg.original_length))
    return 1.0


def rope_frequencies(cfg: Rope, head_dim: int) -> np.ndarray:
    """Return the angles per position [K/2] in a text of at most `original_length` tokens, computed in float64.

    linear: Chen et al. 2023 (position interpolation). llama3: the Llama 3.1 model card's rule. yarn: Peng et al. 2023,
    eq. 23-24 with the ramp over dimensions. longrope: Ding et al. 2024, a divisor for each frequency. dynamic leaves
    such a text as it is.

    Raises:
        ConfigError: the method does not fit the width of a head.
    """
    if head_dim % 2:
        raise ConfigError(f"rope rotates pairs of dimensions, so head_dim {head_dim} must be even")
    inverse = cfg.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if cfg.scaling == "linear":
        return inverse / cfg.factor
    if cfg.scaling == "dynamic" and head_dim == 2:
        raise ConfigError("dynamic rope leaves the first frequency alone, so head_dim must be above 2")
    if cfg.scaling == "llama3":
        turns = cfg.original_length * inverse / (2 * math.pi)
        keep = np.clip((turns - cfg.low_frequency) / (cfg.high_frequency - cfg.low_frequency), 0, 1)
        return inverse * keep + inverse / cfg.factor * (1 - keep)
    if cfg.scaling == "yarn":
        ramp = _yarn_ramp(cfg, head_dim)
        return inverse * (1 - ramp) + inverse / cfg.factor * ramp
    if cfg.scaling == "longrope":
        if len(cfg.short_factors) != head_dim // 2 or len(cfg.long_factors) != head_dim // 2:
            raise ConfigError(
                f"longrope has {len(cfg.short_factors)} short_factors and {len(cfg.long_factors)} long_factors; heads "
                f"of {head_dim} need {head_dim // 2} each"
            )
        return inverse / np.array(cfg.short_factors)
    return inverse


def _yarn_ramp(cfg: Rope, head_dim: int) -> np.ndarray:
    """Return the share [K/2] of each frequency that is interpolated."""
    ends = [
        head_dim * math.log(cfg.original_length / (turns * 2 * math.pi)) / (2 * math.log(cfg.base))
        for turns in (cfg.high_frequency, cfg.low_frequency)
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if cfg.truncate else ends
    low, high = max(low, 0), min(high, head_dim - 1)
    return np.clip((np.arange(head_dim // 2) - low) / (high - low or 1e-3), 0, 1)


def _stretched(cfg: Rope, frequencies: np.ndarray, positions: jax.Array) -> jax.Array:
    """Return the frequencies [B or 1, 1, K/2] of texts that end at their largest position: [K/2], [B or 1, T].

    dynamic: the base grows with the text so that the slowest frequency is interpolated as much as the text is longer
    than `original_length`, times `factor`, and the fastest is kept.
    """
    beyond = positions.max(axis=1)[:, None, None] + 1 - cfg.original_length
    short = jnp.asarray(frequencies, jnp.float32)[None, None]
    if cfg.scaling == "longrope":
        ratio = np.array(cfg.short_factors) / np.array(cfg.long_factors)
        return jnp.where(beyond > 0, jnp.asarray(frequencies * ratio, jnp.float32)[None, None], short)
    stretch = 1 + jnp.maximum(beyond, 0).astype(jnp.float32) * (cfg.factor / cfg.original_length)
    exponents = np.arange(frequencies.size) / (frequencies.size - 1)
    return short * stretch ** -jnp.asarray(exponents, jnp.float32)[None, None]


def rotate(x: jax.Array, positions: jax.Array, cfg: Rope) -> jax.Array:
    """Rotate queries or keys by their positions: x [B, T, H, K], positions [B, T] or [1, T] -> [B, T, H, K].

    Dimension i pairs with i + K/2, as published checkpoints store it. Angles are float32: at position 100,000
    bfloat16 would round them by whole turns.

    dynamic and longrope turn a text of more than `original_length` tokens otherwise than a shorter one. Each row's
    length is its largest position + 1, padding included where it has positions of its own: so a prompt in a batch
    counts as long as the padded prompts are, as in transformers, which takes the batch's longest row. One text of a
    packed row counts as long as the longest. Keys in a cache keep the angles of the length at which they were written,
    so a text that is generated past `original_length` differs from the same text read at once, in transformers too.
    """
    frequencies, scale = rope_frequencies(cfg, x.shape[-1]), magnitude(cfg)
    places = positions[..., None].astype(jnp.float32)
    if cfg.scaling in ("dynamic", "longrope"):
        angles = places * _stretched(cfg, frequencies, positions)
    else:
        angles = places * jnp.asarray(frequencies, jnp.float32)[None, None]
    cos = (jnp.cos(angles) * scale)[:, :, None, :]
    sin = (jnp.sin(angles) * scale)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class Buckets:
    """T5's relative position buckets: one per small distance, then logarithmic (Raffel et al. 2020, section 2.1)."""

    count: int = 32
    max_distance: int = 128  # this and larger distances share the last bucket

    def __post_init__(self) -> None:
        """Check that both halves have a bucket."""
        if self.count < 4 or self.max_distance <= self.count // 2:
            raise ConfigError(
                f"relative position buckets need count >= 4 and max_distance > count / 2,"
                f" not count {self.count} and max_distance {self.max_distance}"
            )


def bucket(offset: jax.Array, cfg: Buckets, *, bidirectional: bool) -> jax.Array:
    """Return the bucket, in [0, count), of each `offset` = key position - query position (any shape, kept).

    Bidirectional: the upper half of the buckets is for keys after the query. Otherwise all buckets are for keys before
    it; a key after it, which causal attention masks, counts as distance 0.

    The table of buckets is computed by NumPy in float32, as in the published code: near a bucket's edge a compiled
    logarithm may round to the other side.
    """
    count = cfg.count // 2 if bidirectional else cfg.count
    exact = count // 2
    distances = np.arange(cfg.max_distance + 1)
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / exact) / math.log(cfg.max_distance / exact)
    far = np.minimum(exact + (ratio * (count - exact)).astype(np.int32), count - 1)
    lookup = jnp.asarray(np.where(distances < exact, distances, far), jnp.int32)
    distance = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    buckets = jnp.take(lookup, jnp.minimum(distance, cfg.max_distance))
    return buckets + jnp.where(offset > 0, count, 0) if bidirectional else buckets
