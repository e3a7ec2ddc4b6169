"""A decoder-only Transformer: GPT-2 and GPT-3, LLaMA, Mistral, Qwen and Gemma from the same pieces.

GPT-2 (Radford et al. 2019): learned positions, pre-norm LayerNorm, tanh-GELU, biases, tied head.
GPT-3 (Brown et al. 2020): as GPT-2, but every second layer attends only to the last 256 keys.
LLaMA (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases, untied head; later versions group heads.

Dims: B batch, T time, S cache slots, D d_model, H heads, G key-value heads, K head_dim, F d_ff, V vocabulary, L layers.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import precision, training
from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.layers.attention import Attention, AttentionConfig, Where
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.embed import Embed
from fm_jax.layers.mlp import MLP, MLPConfig
from fm_jax.layers.norm import Norm, NormConfig
from fm_jax.layers.stack import Remat, stack
from fm_jax.layers.tap import SITES, Tap, visit
from fm_jax.ops.positions import Rope


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model. Positions are learned unless `attention.rope` is set."""

    vocab_size: int
    max_length: int  # longest context
    num_layers: int
    d_model: int
    attention: AttentionConfig
    mlp: MLPConfig
    norm: NormConfig = NormConfig()
    tied: bool = True  # the head uses the token table
    scale_embedding: bool = False  # multiply embeddings by sqrt(d_model) (Gemma)
    scale_by_depth: bool = False  # divide the attention scores of layer l = 1, 2, … by l (some GPT-2s)
    dropout: float = training(0.0)  # dropout rate of the embeddings and of each update to the residual stream
    init_std: float = training(0.02)  # 0: 1/sqrt(fan_in), for small widths
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32
    remat: Remat = training("none")

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("vocab_size", "max_length", "num_layers", "d_model"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout}")


def gpt(num_layers: int, d_model: int, num_heads: int, vocab_size: int = 50257, max_length: int = 1024) -> Config:
    """Return a model of GPT-2's form; heads are d_model / num_heads wide."""
    if d_model % num_heads:
        raise ConfigError(f"d_model {d_model} must be a multiple of num_heads {num_heads}")
    heads = AttentionConfig(num_heads, num_heads, d_model // num_heads)
    return Config(vocab_size, max_length, num_layers, d_model, heads, MLPConfig(4 * d_model))


def gpt3(num_layers: int, d_model: int, num_heads: int) -> Config:
    """Return a model of GPT-3's form: context 2048, alternating dense and banded attention."""
    cfg = gpt(num_layers, d_model, num_heads, max_length=2048)
    return replace(cfg, attention=replace(cfg.attention, windows=(0, 256)))


def llama(
    num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, vocab_size: int = 32000
) -> Config:
    """Return a model of LLaMA's form, context 4096."""
    heads = AttentionConfig(num_heads, num_kv_heads, d_model // num_heads, rope=Rope(), qkv_bias=False, out_bias=False)
    gated = MLPConfig(d_ff, activation="silu", gated=True, bias=False)
    return Config(vocab_size, 4096, num_layers, d_model, heads, gated, NormConfig("rms", 1e-5), tied=False)


def tiny() -> Config:
    """Return a model for tests: 2 layers of width 32."""
    return replace(gpt(2, 32, 4, vocab_size=96, max_length=32), init_std=0.0)


def lm10k() -> Config:
    """Return the 6-layer, width 512, 8-head Transformer over a vocabulary of 10,000."""
    return gpt(6, 512, 8, vocab_size=10_000, max_length=512)


# Radford et al. 2019, table 2, with 12 heads of 64 at the smallest size
gpt2_small = partial(gpt, 12, 768, 12)  # 124 M
gpt2_medium = partial(gpt, 24, 1024, 16)  # 355 M
gpt2_large = partial(gpt, 36, 1280, 20)  # 774 M
gpt2_xl = partial(gpt, 48, 1600, 25)  # 1.56 B

# Brown et al. 2020, table 2.1. Its rows XL (24 heads of 128 at width 2048) and 13B (width 5140) are inconsistent;
# 16 heads and width 5120 are consistent and give the stated parameter counts.
gpt3_small = partial(gpt3, 12, 768, 12)
gpt3_medium = partial(gpt3, 24, 1024, 16)
gpt3_large = partial(gpt3, 24, 1536, 16)
gpt3_xl = partial(gpt3, 24, 2048, 16)
gpt3_2_7b = partial(gpt3, 32, 2560, 32)
gpt3_6_7b = partial(gpt3, 32, 4096, 32)
gpt3_13b = partial(gpt3, 40, 5120, 40)
gpt3_175b = partial(gpt3, 96, 12288, 96)

# Touvron et al. 2023, table 1 (Llama 2)
llama2_7b = partial(llama, 32, 4096, 32, 32, 11008)
llama2_13b = partial(llama, 40, 5120, 40, 40, 13824)
llama2_70b = partial(llama, 80, 8192, 64, 8, 28672)


def llama3_8b() -> Config:
    """Return Llama 3.1 8B's sizes (its model card): grouped heads, rotary base 500,000 scaled by 8."""
    cfg = llama(32, 4096, 32, 8, 14336, vocab_size=128_256)
    rope = Rope(base=500_000.0, scaling="llama3", factor=8.0)
    return replace(cfg, max_length=131_072, attention=replace(cfg.attention, rope=rope))


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, V] with causal attention."""

    cfg: Config

    causal = True
    sites = SITES

    def setup(self) -> None:
        """Declare the submodules."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        rows = 0 if cfg.attention.rope else cfg.max_length
        # Fan-in scaling would give a table's rows unit norm over D, which is too large for a tied head.
        table = normal(cfg.init_std or 0.02)
        self.embed = Embed(cfg.vocab_size, cfg.d_model, rows, table, dtype)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = stack(Block, cfg.num_layers, cfg.remat)(cfg)
        self.norm_final = Norm(cfg.norm, dtype)
        if not cfg.tied:
            wide: dict[str, Any] = {"bias": False, "dtype": dtype, "out_dtype": jnp.float32}
            self.head = dense(cfg.vocab_size, ("embed", "vocab"), init=normal(cfg.init_std), **wide)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return next-token logits [B, T, V] in float32.

        Args:
            tokens: ids [B, T].
            positions: [B, T], default 0, 1, …; required with a cache and for packed documents.
            segments: document indices [B, T] of a packed batch; attention stays within a document.
            tap: sites to read or edit.
        """
        return self.logits(self.hidden(tokens, positions=positions, segments=segments, tap=tap))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return the normalised hidden states [B, T, D], the head's input."""
        cfg, time = self.cfg, tokens.shape[1]
        if time > cfg.max_length:
            raise ConfigError(f"{time} tokens exceed the model's max_length {cfg.max_length}; shorten the text")
        if positions is None:
            positions = jnp.arange(time, dtype=jnp.int32)[None]
        x = self.embed(tokens, positions)
        if cfg.scale_embedding:
            x = x * jnp.asarray(cfg.d_model**0.5, x.dtype)
        x = visit(self, tap, "embed", self.dropout(x, deterministic=not self.has_rng("dropout")))
        x = constrain(x, "batch", "time", "width")
        x, _ = self.blocks(x, (_windows(cfg), _divisors(cfg), tap and tap.stacked()), Where(positions, segments))
        return visit(self, tap, "final", self.norm_final(x))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits [..., V] in float32."""
        if self.cfg.tied:
            return self.embed.attend(hidden)
        return self.head(hidden)


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    cfg: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, layered: tuple[jax.Array | None, jax.Array | None, Tap | None], where: Where
    ) -> tuple[jax.Array, None]:
        """Apply the layer to the residual stream: [B, T, D] -> [B, T, D]."""
        cfg, (window, divisor, tap) = self.cfg, layered
        dtype = jnp.dtype(cfg.dtype)
        # The two projections into the residual stream start smaller, so that its variance does not grow with L.
        out_init = normal(cfg.init_std, gain=(2 * cfg.num_layers) ** -0.5)
        inits: dict[str, Any] = {"kernel_init": normal(cfg.init_std), "out_init": out_init, "dtype": dtype}
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))

        x = visit(self, tap, "block.resid_pre", x)
        attend = Attention(cfg.attention, norm_epsilon=cfg.norm.epsilon, name="attn", **inits)
        x = x + drop(attend(Norm(cfg.norm, dtype, name="norm_attn")(x), where, window, tap, divisor=divisor))
        x = visit(self, tap, "block.resid_mid", x)
        feed = MLP(cfg.mlp, name="mlp", **inits)
        x = x + drop(feed(Norm(cfg.norm, dtype, name="norm_mlp")(x), tap))
        x = visit(self, tap, "block.resid_post", x)
        return constrain(x, "batch", "time", "width"), None


def _windows(cfg: Config) -> jax.Array | None:
    """Return each layer's window [L] if they differ; None if all layers share the config's window."""
    windows = cfg.attention.windows
    if len(set(windows)) == 1:
        return None
    return jnp.array([windows[layer % len(windows)] for layer in range(cfg.num_layers)], jnp.int32)


def _divisors(cfg: Config) -> jax.Array | None:
    """Return the number [L] by which each layer's scores are divided; None if by none."""
    return jnp.arange(1, cfg.num_layers + 1, dtype=jnp.float32) if cfg.scale_by_depth else None
