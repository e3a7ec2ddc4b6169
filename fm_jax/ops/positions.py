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
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0  # context length divided by `original_length`
    original_length: int = 8192  # context length of the original training
    low_frequency: float = 1.0  # llama3: dimensions with fewer turns are scaled by the full factor; yarn: beta_slow
    high_frequency: float = 4.0  # llama3: dimensions with more turns are not scaled; yarn: beta_fast

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if self.base <= 1 or self.factor < 1:
            raise ConfigError(f"rope needs base > 1 and factor ≥ 1, not base {self.base} and factor {self.factor}")


def rope_frequencies(cfg: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Return (angles per position [K/2], attention factor), computed in float64.

    linear: Chen et al. 2023 (position interpolation). llama3: the Llama 3.1 model card's rule. yarn: Peng et
    al. 2023, eq. 23-24 with the ramp over dimensions; its attention factor 0.1 ln(factor) + 1 scales cos and sin.
    """
    if head_dim % 2:
        raise ConfigError(f"rope rotates pairs of dimensions, so head_dim {head_dim} must be even")
    inverse = cfg.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if cfg.scaling == "linear":
        return inverse / cfg.factor, 1.0
    if cfg.scaling == "llama3":
        turns = cfg.original_length * inverse / (2 * math.pi)
        keep = np.clip((turns - cfg.low_frequency) / (cfg.high_frequency - cfg.low_frequency), 0, 1)
        return inverse * keep + inverse / cfg.factor * (1 - keep), 1.0
    if cfg.scaling == "yarn":
        low = math.floor(_yarn_dimension(cfg, cfg.high_frequency, head_dim))
        high = math.ceil(_yarn_dimension(cfg, cfg.low_frequency, head_dim))
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return inverse * (1 - ramp) + inverse / cfg.factor * ramp, 0.1 * math.log(cfg.factor) + 1.0
    return inverse, 1.0


def _yarn_dimension(cfg: Rope, turns: float, head_dim: int) -> float:
    return head_dim * math.log(cfg.original_length / (turns * 2 * math.pi)) / (2 * math.log(cfg.base))


def rotate(x: jax.Array, positions: jax.Array, cfg: Rope) -> jax.Array:
    """Rotate queries or keys by their positions: x [B, T, H, K], positions [B, T] or [1, T] -> [B, T, H, K].

    Dimension i pairs with i + K/2, as published checkpoints store it. Angles are float32: at position 100,000
    bfloat16 would round them by whole turns.
    """
    frequencies, scale = rope_frequencies(cfg, x.shape[-1])
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
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
