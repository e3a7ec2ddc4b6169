"""An encoder-decoder Transformer, T5: one text in, another out.

T5 (Raffel et al. 2020): pre-norm RMSNorm, no biases, and a relative position bias instead of position embeddings, one
table per stack shared by its layers, none in cross-attention. Scores are not divided by sqrt(K); instead, queries are
initialised smaller by that factor. ReLU; the head is the token table, and its input is divided by sqrt(D).
T5 v1.1 (Shazeer 2020; the authors' released checkpoints): gated tanh-GELU, an untied head, no division.
mT5 (Xue et al. 2021) is v1.1 with a larger vocabulary.

Dims: B batch, S source, T time, C cache slots, D d_model, H heads, K head_dim, F d_ff, V vocabulary, L layers.
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
from fm_jax.layers.attention import Attention, AttentionConfig, CrossAttention, Where
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.embed import Embed
from fm_jax.layers.mlp import MLP, MLPConfig
from fm_jax.layers.norm import Norm, NormConfig
from fm_jax.layers.relative import RelativeBias
from fm_jax.layers.stack import FIRST, Remat, stack
from fm_jax.layers.tap import CROSS, ENCODER, SITES, Tap, visit
from fm_jax.ops.positions import Buckets


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model. Encoder and decoder differ only in depth."""

    vocab_size: int
    max_length: int  # maximum number of generated tokens, including the start; inputs may have any length
    num_encoder_layers: int
    num_decoder_layers: int
    d_model: int
    attention: AttentionConfig  # self-attention and cross-attention; the encoder's is made bidirectional
    mlp: MLPConfig
    norm: NormConfig = NormConfig("rms", 1e-6)
    buckets: Buckets = Buckets()
    tied: bool = True  # the head uses the token table
    scale_head: bool = True  # divide the head's input by sqrt(d_model)
    dropout: float = training(0.0)  # dropout rate of each stack's input and output, and of each residual update
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32
    remat: Remat = training("none")

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("vocab_size", "max_length", "num_encoder_layers", "num_decoder_layers", "d_model"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.attention.causal or any(self.attention.windows):
            raise ConfigError("attention is that of the decoder; set attention.causal to true and windows to 0")


def t5(num_layers: int, d_model: int, num_heads: int, d_ff: int, head_dim: int = 64, vocab_size: int = 32128) -> Config:
    """Return a model of T5's form; num_heads · head_dim may differ from d_model."""
    heads = AttentionConfig(num_heads, num_heads, head_dim, qkv_bias=False, out_bias=False, scale=1.0)
    feed = MLPConfig(d_ff, activation="relu", bias=False)
    return Config(vocab_size, 512, num_layers, num_layers, d_model, heads, feed)


def t5_v1_1(
    num_layers: int, d_model: int, num_heads: int, d_ff: int, head_dim: int = 64, vocab_size: int = 32128
) -> Config:
    """Return a model of T5 v1.1's form."""
    cfg = t5(num_layers, d_model, num_heads, d_ff, head_dim, vocab_size)
    gated = replace(cfg.mlp, activation="gelu_tanh", gated=True)
    return replace(cfg, mlp=gated, tied=False, scale_head=False)


def tiny() -> Config:
    """Return a model for tests: 2 + 2 layers of width 32."""
    return replace(t5(2, 32, 4, 64, 8, vocab_size=96), max_length=32, buckets=Buckets(8, 16))


def with_dropout(cfg: Config, rate: float) -> Config:
    """Set one dropout rate wherever T5 has dropout: 0.1 in v1.0 and in all finetuning, 0 in v1.1's pretraining."""
    attention, mlp = replace(cfg.attention, dropout=rate), replace(cfg.mlp, dropout=rate)
    return replace(cfg, attention=attention, mlp=mlp, dropout=rate)


# Raffel et al. 2020, section 3.7
t5_small = partial(t5, 6, 512, 8, 2048)  # 61 M
t5_base = partial(t5, 12, 768, 12, 3072)  # 223 M
t5_large = partial(t5, 24, 1024, 16, 4096)  # 738 M
t5_3b = partial(t5, 24, 1024, 32, 16384, 128)  # 2.85 B
t5_11b = partial(t5, 24, 1024, 128, 65536, 128)  # 11.3 B

# sizes of the released v1.1 checkpoints
t5_v1_1_small = partial(t5_v1_1, 8, 512, 6, 1024)  # 77 M
t5_v1_1_base = partial(t5_v1_1, 12, 768, 12, 2048)  # 248 M
t5_v1_1_large = partial(t5_v1_1, 24, 1024, 16, 2816)  # 783 M
t5_v1_1_xl = partial(t5_v1_1, 24, 2048, 32, 5120)  # 2.85 B
t5_v1_1_xxl = partial(t5_v1_1, 24, 4096, 64, 10240)  # 11.1 B

# Xue et al. 2021: the same shapes with 250,112 tokens
mt5_small = partial(t5_v1_1_small, vocab_size=250_112)  # 300 M
mt5_base = partial(t5_v1_1_base, vocab_size=250_112)  # 582 M
mt5_large = partial(t5_v1_1_large, vocab_size=250_112)  # 1.23 B
mt5_xl = partial(t5_v1_1_xl, vocab_size=250_112)  # 3.74 B
mt5_xxl = partial(t5_v1_1_xxl, vocab_size=250_112)  # 12.9 B


class EncoderDecoder(nn.Module):
    """Decoder tokens [B, T] and source [B, S] -> logits [B, T, V]; the decoder is causal."""

    cfg: Config

    sites = (*(ENCODER + site for site in SITES), *SITES, *CROSS)
    causal = True

    def setup(self) -> None:
        """Declare the submodules."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        self.embed = Embed(cfg.vocab_size, cfg.d_model, 0, normal(1.0), dtype)
        self.encoder = Stack(cfg, causal=False)
        self.decoder = Stack(cfg, causal=True)
        if not cfg.tied:
            wide: dict[str, Any] = {"bias": False, "dtype": dtype, "out_dtype": jnp.float32}
            self.head = dense(cfg.vocab_size, ("embed", "vocab"), init=normal(0.0), **wide)

    def __call__(
        self,
        tokens: jax.Array,
        source: jax.Array | None = None,
        source_length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return next-token logits [B, T, V] in float32.

        If the collection "cache" is mutable, a call with a source stores the source's keys and values there; a call
        without a source uses them.

        Args:
            tokens: decoder ids [B, T]: T5's targets shifted right, the first is 0 (the padding id).
            source: encoder ids [B, S]; None only with a cache filled from a source.
            source_length: number of real tokens [B] in each row of the source; None: all.
            positions: [B, T], default 0, 1, …; required with a cache and for packed documents.
            segments: document indices [B, T] of packed `tokens`: self-attention stays within a document,
                cross-attention covers the whole source.
            tap: sites to read or edit.
        """
        where = {"positions": positions, "segments": segments}
        return self.logits(self.hidden(tokens, source=source, source_length=source_length, **where, tap=tap))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        source: jax.Array | None = None,
        source_length: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return the decoder's normalised states [B, T, D], the head's input; arguments as of `__call__`."""
        memory = None
        if source is not None:
            memory = self.encode(source, source_length, tap=tap)
            if source_length is None:
                source_length = jnp.full(source.shape[:1], source.shape[1], jnp.int32)
        elif not (self.is_mutable_collection("cache") and self.has_variable("cache", "decoder")):
            raise ConfigError("an encoder-decoder needs a source, or a mutable cache filled from one; pass `source`")
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = self.embed(tokens, positions)
        return self.decoder(x, Where(positions, segments), memory, source_length, tap)

    def encode(self, source: jax.Array, source_length: jax.Array | None = None, *, tap: Tap | None = None) -> jax.Array:
        """Return the encoder's normalised states [B, S, D]; those of padding are finite but meaningless."""
        index, segments = jnp.arange(source.shape[1], dtype=jnp.int32)[None], None
        if source_length is not None:
            inside = index < source_length[:, None]
            # Padding is its own segment. An id outside the vocabulary would embed as NaN, which no mask removes.
            source, segments = jnp.where(inside, source, 0), inside.astype(jnp.int32)
        x = self.embed(source, index)
        return self.encoder(x, Where(index, segments), None, None, tap and tap.inside(ENCODER))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits [..., V] in float32."""
        if self.cfg.scale_head:
            hidden = hidden * jnp.asarray(self.cfg.d_model**-0.5, hidden.dtype)
        return self.embed.attend(hidden) if self.cfg.tied else self.head(hidden)


class Stack(nn.Module):
    """All layers of the encoder or the decoder, with position bias and final norm: [B, T, D] -> [B, T, D]."""

    cfg: Config
    causal: bool  # true: decoder

    @nn.compact
    def __call__(
        self, x: jax.Array, where: Where, memory: jax.Array | None, length: jax.Array | None, tap: Tap | None
    ) -> jax.Array:
        """Apply the stack to embedded tokens [B, T, D]; the decoder reads `length` [B] states of memory [B, S, D]."""
        cfg = self.cfg
        layers = cfg.num_decoder_layers if self.causal else cfg.num_encoder_layers
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))
        x = visit(self, tap, "embed", drop(x))
        x = constrain(x, "batch", "time", "width")
        init = normal(cfg.d_model**-0.5)
        relative = RelativeBias(cfg.buckets, cfg.attention.num_heads, not self.causal, init, name="bias")
        where = where._replace(bias=relative(where.positions, self._keys(where.positions)))
        blocks = stack(Block, layers, cfg.remat)(cfg, self.causal, name="blocks")
        x, _ = blocks(x, tap and tap.stacked(), (where, memory, length))
        return visit(self, tap, "final", drop(Norm(cfg.norm, jnp.dtype(cfg.dtype), name="norm_final")(x)))

    def _keys(self, positions: jax.Array) -> jax.Array:
        """Return the positions of the keys [B or 1, C]; the position of a cache slot is its index."""
        kept = self.get_variable("cache", "blocks") if self.causal and self.is_mutable_collection("cache") else None
        if kept is None:
            return positions
        one = kept.get(FIRST, kept)  # the first layer's, if each has its own
        return jnp.arange(one["attn"]["key"].shape[-1], dtype=jnp.int32)[None]


class Block(nn.Module):
    """One pre-norm layer: self-attention, in the decoder cross-attention, then feed-forward."""

    cfg: Config
    causal: bool  # true: decoder

    @nn.compact
    def __call__(
        self, x: jax.Array, tap: Tap | None, shared: tuple[Where, jax.Array | None, jax.Array | None]
    ) -> tuple[jax.Array, None]:
        """Apply the layer to the residual stream: [B, T, D] -> [B, T, D]."""
        cfg, (where, memory, length) = self.cfg, shared
        heads, dtype = replace(cfg.attention, causal=self.causal), jnp.dtype(cfg.dtype)
        # fan-in initialisation throughout; queries are smaller by sqrt(K), because scores are not divided by it
        inits: dict[str, Any] = {"kernel_init": normal(0.0), "out_init": normal(0.0), "dtype": dtype}
        query = normal(0.0, gain=heads.head_dim**-0.5)
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))

        x = visit(self, tap, "block.resid_pre", x)
        attend = Attention(heads, query_init=query, name="attn", **inits)
        x = x + drop(attend(Norm(cfg.norm, dtype, name="norm_attn")(x), where, tap=tap))
        if self.causal:
            read = CrossAttention(heads, query_init=query, name="cross", **inits)
            x = x + drop(read(Norm(cfg.norm, dtype, name="norm_cross")(x), memory, length, tap))
        x = visit(self, tap, "block.resid_mid", x)
        feed = MLP(cfg.mlp, name="mlp", **inits)
        x = x + drop(feed(Norm(cfg.norm, dtype, name="norm_mlp")(x), tap))
        x = visit(self, tap, "block.resid_post", x)
        return constrain(x, "batch", "time", "width"), None
