"""Self-attention and cross-attention with grouped heads, positions, windows, segments, a cache and taps.

Dims: B batch, T queries, S keys, H heads, G key-value heads, K head width, D model width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import check_least, training
from fm_jax.core.errors import ConfigError
from fm_jax.layers.cache import lay, lift, write
from fm_jax.layers.dense import Initializer, dense
from fm_jax.layers.norm import Norm, NormConfig
from fm_jax.layers.tap import Tap, touches, visit
from fm_jax.ops import attention as ops
from fm_jax.ops import masking
from fm_jax.ops.positions import Rope, rope_frequencies, rotate


@dataclass(frozen=True)
class AttentionConfig:
    """Heads, masking, and the treatment of queries and keys."""

    num_heads: int
    num_kv_heads: int  # fewer than num_heads: grouped-query attention (Ainslie et al. 2023)
    head_dim: int
    causal: bool = True  # attend to the own and earlier positions only; false: to the whole segment
    rope: Rope | None = None
    windows: tuple[int, ...] = (0,)  # number of last keys that each layer attends to, cycled over layers; 0: no limit
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False  # RMSNorm over each head's queries and keys (Qwen 3)
    scale: float = 0.0  # factor of the scores; 0: 1/sqrt(head_dim)
    dropout: float = training(0.0)  # dropout rate of the attention weights

    def __post_init__(self) -> None:
        """Check head counts, windows and rotary positions."""
        check_least(self, num_heads=1, num_kv_heads=1, head_dim=1)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if not self.windows or min(self.windows) < 0:
            raise ConfigError(f"windows {self.windows} must be one or more numbers ≥ 0 (0: no window)")
        if not self.causal and any(self.windows):
            raise ConfigError(f"windows {self.windows} need causal attention; set windows to 0")
        if self.rope is not None:
            rope_frequencies(self.rope, self.head_dim)  # raises if its method does not fit the width of a head


class Where(NamedTuple):
    """Positions and segments of a batch's tokens, the same for every layer."""

    positions: jax.Array  # [B or 1, T]
    segments: jax.Array | None = None  # [B, T], indices of packed documents; padding is its own segment
    bias: jax.Array | None = None  # [B or 1, H, T, S], added to the scaled scores


class Attention(nn.Module):
    """Self-attention within segments, causal or not: [B, T, D] -> [B, T, D]."""

    cfg: AttentionConfig
    kernel_init: Initializer
    out_init: Initializer
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    query_init: Initializer | None = None  # initialiser of queries, if it differs from that of keys and values

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        where: Where,
        window: jax.Array | None = None,
        tap: Tap | None = None,
        *,
        divisor: jax.Array | None = None,
    ) -> jax.Array:
        """Return the update to the residual stream: x [B, T, D] -> [B, T, D].

        If the collection "cache" is mutable, causal attention writes keys and values to it and reads them from it.

        Args:
            x: the layer's input [B, T, D].
            where: positions and segments.
            window: [] overrides the config's for this layer (a scanned stack passes each layer its own).
            tap: sites to read or edit.
            divisor: [] of this layer's scores. It divides the queries, so that products stay in float16's range.
        """
        cfg, (batch, time, _) = self.cfg, x.shape
        query = visit(self, tap, "block.attn.q", self._heads("q", cfg.num_heads, x))
        key = visit(self, tap, "block.attn.k", self._heads("k", cfg.num_kv_heads, x))
        value = visit(self, tap, "block.attn.v", self._heads("v", cfg.num_kv_heads, x))
        if cfg.qk_norm:
            head_norm = NormConfig(kind="rms", epsilon=self.norm_epsilon)
            query = Norm(head_norm, self.dtype, name="norm_q")(query)
            key = Norm(head_norm, self.dtype, name="norm_k")(key)
        if cfg.rope is not None:
            query = rotate(query, where.positions, cfg.rope)
            key = rotate(key, where.positions, cfg.rope)
        if divisor is not None:
            query = query / divisor.astype(query.dtype)
        size = cfg.windows[0] if window is None else window
        seen: dict[str, Any]
        if cfg.causal and self.is_mutable_collection("cache") and not self.is_initializing():
            key, value, mask = self._cached(key, value, where.positions, size)
            seen = {"mask": mask}
        else:
            seen = {"is_causal": cfg.causal, "window": size, "windows": cfg.windows, "segments": where.segments}
        z = _attend(self, cfg, (query, key, value), seen, where.bias, "block.attn", tap)
        z = visit(self, tap, "block.attn.z", z)
        out = dense(x.shape[-1], ("heads", "embed"), bias=cfg.out_bias, init=self.out_init, dtype=self.dtype, name="o")(
            z.reshape(batch, time, cfg.num_heads * cfg.head_dim)
        )
        return visit(self, tap, "block.attn.out", out)

    def _heads(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        init = self.query_init or self.kernel_init if name == "q" else self.kernel_init
        return _heads(self.cfg, init, self.dtype, name, heads, x)

    def _cached(
        self, key: jax.Array, value: jax.Array, positions: jax.Array, window: jax.Array | int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        key, value = lay(key, value)
        stored_key = self.variable("cache", "key", jnp.zeros, key.shape, key.dtype)
        stored_value = self.variable("cache", "value", jnp.zeros, value.shape, value.dtype)
        stored_key.value = write(stored_key.value, key, positions, axis=3)
        stored_value.value = write(stored_value.value, value, positions, axis=2)
        slots = jnp.arange(stored_key.value.shape[3])[None]
        mask = masking.causal(positions, slots) & masking.window(positions, slots, window)
        return *lift(stored_key.value, stored_value.value), mask


class CrossAttention(nn.Module):
    """Cross-attention from x [B, T, D] to a memory [B, S, D] -> [B, T, D]; sites are "cross.*"."""

    cfg: AttentionConfig
    kernel_init: Initializer
    out_init: Initializer
    dtype: Any = jnp.float32
    query_init: Initializer | None = None  # initialiser of queries, if it differs from that of keys and values

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array | None, length: jax.Array | None, tap: Tap | None = None
    ) -> jax.Array:
        """Return the update to the residual stream: [B, T, D].

        If the collection "cache" is mutable, the memory's keys and values are stored in it; without a memory they are
        read from it. So a memory is projected once for all tokens generated from it.

        Args:
            x: the queries' input [B, T, D].
            memory: the keys' and values' input [B, S, D], or None to read the cache.
            length: number of real positions [B] of the memory; None without a memory.
            tap: sites to read or edit.
        """
        cfg, (batch, time, _) = self.cfg, x.shape
        query = visit(self, tap, "cross.q", self._heads("q", cfg.num_heads, x))
        if memory is None or length is None:
            key, value, length = (self.get_variable("cache", name) for name in ("key", "value", "length"))
            key, value = lift(key, value)
        else:
            key = visit(self, tap, "cross.k", self._heads("k", cfg.num_kv_heads, memory))
            value = visit(self, tap, "cross.v", self._heads("v", cfg.num_kv_heads, memory))
            if self.is_mutable_collection("cache") and not self.is_initializing():
                for name, kept in zip(("key", "value", "length"), (*lay(key, value), length), strict=True):
                    self.put_variable("cache", name, kept)
        inside = jnp.arange(key.shape[1])[None] < length[:, None]
        z = _attend(self, cfg, (query, key, value), {"keys": inside}, None, "cross", tap)
        z = visit(self, tap, "cross.z", z)
        out = dense(x.shape[-1], ("heads", "embed"), bias=cfg.out_bias, init=self.out_init, dtype=self.dtype, name="o")(
            z.reshape(batch, time, cfg.num_heads * cfg.head_dim)
        )
        return visit(self, tap, "cross.out", out)

    def _heads(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        init = self.query_init or self.kernel_init if name == "q" else self.kernel_init
        return _heads(self.cfg, init, self.dtype, name, heads, x)


def _heads(cfg: AttentionConfig, init: Initializer, dtype: Any, name: str, heads: int, x: jax.Array) -> jax.Array:
    """Project [B, T, D] to heads [B, T, heads, K]."""
    width = heads * cfg.head_dim
    project = dense(width, ("embed", "heads"), bias=cfg.qkv_bias, init=init, dtype=dtype, name=name)
    return project(x).reshape(*x.shape[:2], heads, cfg.head_dim)


def _attend(
    module: nn.Module,
    cfg: AttentionConfig,
    heads: tuple[jax.Array, jax.Array, jax.Array],
    seen: dict[str, Any],
    bias: jax.Array | None,
    site: str,
    tap: Tap | None,
) -> jax.Array:
    """Attend in one fused call, or step by step if a tap or dropout needs the weights: heads -> [B, T, H, K].

    `seen` are the arguments of `ops.attention` that say which keys a query sees: a complete mask, or its description.
    """
    query, key, value = heads
    scale = cfg.scale or cfg.head_dim**-0.5
    drop = cfg.dropout > 0 and module.has_rng("dropout")
    if not drop and not touches(tap, f"{site}.scores") and not touches(tap, f"{site}.pattern"):
        return ops.attention(query, key, value, scale=scale, bias=bias, **seen)
    mask = seen["mask"] if "mask" in seen else ops.visible(query.shape[1], key.shape[1], **seen)
    scores = visit(module, tap, f"{site}.scores", ops.scores(query, key, scale, bias))
    pattern = visit(module, tap, f"{site}.pattern", ops.pattern(scores, mask))
    if drop:
        pattern = nn.Dropout(cfg.dropout, deterministic=False)(pattern)
    return ops.mix(pattern, value)
