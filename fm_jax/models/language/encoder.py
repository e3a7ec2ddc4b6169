"""A bidirectional Transformer: BERT, RoBERTa, DistilBERT, ELECTRA and ALBERT from the same pieces.

BERT (Devlin et al. 2019): learned positions and token types, summed and normalised; post-norm layers, so the last
layer's output needs no further norm; erf-GELU, biases.
RoBERTa (Liu et al. 2019) counts positions from 2 and has one token type, DistilBERT (Sanh et al. 2019) has none.
ELECTRA (Clark et al. 2020) and ALBERT (Lan et al. 2020) have narrower embeddings, projected to the layers' width.
ALBERT shares one layer's parameters at every depth, or those of a few groups of layers.
Heads are in classifier, tagger, span, masked_lm and sentence.

Dims: B batch, T time, D d_model, E embed_size (D if 0), H heads, K head_dim, F d_ff, V vocabulary, L layers.
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


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    vocab_size: int
    max_length: int  # longest text
    num_layers: int
    d_model: int
    attention: AttentionConfig
    mlp: MLPConfig
    norm: NormConfig = NormConfig("layer", 1e-12)
    num_types: int = 2  # token types (first and second text of a pair); 0: none
    embed_size: int = 0  # width of the embeddings, projected to d_model; 0: d_model, without projection
    position_offset: int = 0  # row of the first position in the table; for RoBERTa its padding id + 1
    shared: bool | tuple[int, int] = False  # one layer's parameters at every depth (ALBERT); or groups, see `copies`
    dropout: float = training(0.0)  # dropout rate of the embeddings and of each update to the residual stream
    init_std: float = training(0.02)  # 0: 1/sqrt(fan_in), for small widths
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32
    remat: Remat = training("none")

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("vocab_size", "max_length", "num_layers", "d_model"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("num_types", "embed_size", "position_offset"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.attention.causal:
            raise ConfigError("attention.causal is true, but this encoder is bidirectional; set it to false")
        if self.attention.rope is not None:
            raise ConfigError("attention.rope is set, but this encoder's positions are learned; set it to none")
        if isinstance(self.shared, tuple):
            groups, inner = self.shared
            if min(self.shared) < 1 or not 2 <= groups * inner <= self.num_layers or self.num_layers % inner:
                raise ConfigError(
                    f"shared is {groups} groups of {inner} layers: num_layers {self.num_layers} must be a multiple of "
                    f"{inner} and at least {groups * inner}; one group of one layer is written true"
                )


def bert(num_layers: int, d_model: int, num_heads: int, vocab_size: int = 30522, dropout: float = 0.1) -> Config:
    """Return a model of BERT's form; heads are d_model / num_heads wide and the feed-forward layer 4 · d_model."""
    if d_model % num_heads:
        raise ConfigError(f"d_model {d_model} must be a multiple of num_heads {num_heads}")
    heads = AttentionConfig(num_heads, num_heads, d_model // num_heads, causal=False, dropout=dropout)
    return Config(vocab_size, 512, num_layers, d_model, heads, MLPConfig(4 * d_model, "gelu"), dropout=dropout)


def roberta(num_layers: int, d_model: int, num_heads: int) -> Config:
    """Return a model of RoBERTa's form."""
    cfg = bert(num_layers, d_model, num_heads, vocab_size=50265)
    return replace(cfg, norm=NormConfig("layer", 1e-5), num_types=1, position_offset=2)


def tiny() -> Config:
    """Return a model for tests: 2 layers of width 32."""
    return replace(bert(2, 32, 4, vocab_size=96, dropout=0.0), max_length=32, init_std=0.0)


# Devlin et al. 2019, section 3
bert_base = partial(bert, 12, 768, 12)  # 110 M
bert_large = partial(bert, 24, 1024, 16)  # 335 M

# Liu et al. 2019, section 3 and table 9
roberta_base = partial(roberta, 12, 768, 12)  # 125 M
roberta_large = partial(roberta, 24, 1024, 16)  # 355 M


def distilbert() -> Config:
    """Return DistilBERT's sizes: every second layer of BERT base, no token types."""
    return replace(bert(6, 768, 12), num_types=0)


def electra_small() -> Config:
    """Return ELECTRA small's discriminator (Clark et al. 2020, table 6)."""
    return replace(bert(12, 256, 4), embed_size=128)


electra_base = partial(bert, 12, 768, 12)


def albert_base() -> Config:
    """Return ALBERT base's sizes (Lan et al. 2020, table 1; version 2: no dropout)."""
    cfg = bert(12, 768, 12, vocab_size=30000, dropout=0.0)
    return replace(cfg, embed_size=128, shared=True, mlp=MLPConfig(3072, "gelu_tanh"))


def copies(cfg: Config) -> tuple[int, ...]:
    """Return which copy of the parameters each layer uses, if there are fewer copies than layers; () if not.

    `shared` is the number of groups and the number of layers in each. The layers of a group are applied in turn, over
    and over, until the next group's turn: with (2, 1) four layers use 0, 0, 1, 1, and with (1, 2) they use 0, 1, 0, 1.
    """
    if not isinstance(cfg.shared, tuple):
        return ()
    groups, inner = cfg.shared
    rounds = cfg.num_layers // inner
    # a quotient of floats, as in the published code: it decides where rounds / groups is no whole number
    return tuple(int(turn / (rounds / groups)) * inner + layer for turn in range(rounds) for layer in range(inner))


class Encoder(nn.Module):
    """Tokens [B, T] -> hidden states [B, T, D] with bidirectional attention within segments."""

    cfg: Config

    causal = False
    sites = SITES

    def setup(self) -> None:
        """Declare the submodules."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        width, table = cfg.embed_size or cfg.d_model, normal(cfg.init_std or 0.02)
        self.embed = Embed(cfg.vocab_size, width, cfg.max_length + cfg.position_offset, table, dtype)
        if cfg.num_types:
            rows = nn.with_logical_partitioning(table, (None, "embed"))
            self.types = self.param("types", rows, (cfg.num_types, width), jnp.float32)
        self.norm_embed = Norm(cfg.norm, dtype)
        if cfg.embed_size:
            self.project = dense(cfg.d_model, ("embed", None), bias=True, init=normal(cfg.init_std), dtype=dtype)
        self.dropout = nn.Dropout(cfg.dropout)
        how: dict[str, Any] = {"shared": cfg.shared is True, "copies": copies(cfg), "init": self.is_initializing()}
        blocks = stack(Block, cfg.num_layers, cfg.remat, **how)(cfg)
        if cfg.shared:
            self.block = blocks  # not "blocks": leaves under "blocks" are expected to be stacked by layer
        else:
            self.blocks = blocks

    def __call__(
        self,
        tokens: jax.Array,
        *,
        types: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return the hidden states [B, T, D] of tokens [B, T]; arguments as of `hidden`."""
        return self.hidden(tokens, types=types, segments=segments, positions=positions, tap=tap)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        types: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return the hidden states [B, T, D].

        Args:
            tokens: ids [B, T].
            types: token types [B, T], default 0.
            segments: segment indices [B, T]; attention stays within a segment. Padding is its own segment (0).
            positions: [B, T], default 0, 1, …; required for packed texts.
            tap: sites to read or edit.

        Raises:
            ConfigError: a text longer than max_length, or token types for a model without them.
        """
        cfg, time = self.cfg, tokens.shape[1]
        if time > cfg.max_length:
            raise ConfigError(f"{time} tokens exceed the model's max_length {cfg.max_length}; shorten the text")
        if types is not None and not cfg.num_types:
            raise ConfigError("the model has no token types (num_types 0); do not pass `types`")
        if positions is None:
            positions = jnp.arange(time, dtype=jnp.int32)[None]
        x = self.embed(tokens, positions + cfg.position_offset)
        if cfg.num_types:
            kinds = jnp.zeros((1, time), jnp.int32) if types is None else types
            x = x + jnp.take(self.types, kinds, axis=0).astype(x.dtype)
        x = self.dropout(self.norm_embed(x), deterministic=not self.has_rng("dropout"))
        x = visit(self, tap, "embed", self.project(x) if cfg.embed_size else x)
        x = constrain(x, "batch", "time", "width")
        blocks = self.block if cfg.shared else self.blocks
        x, _ = blocks(x, tap and tap.stacked(), Where(positions, segments))
        return visit(self, tap, "final", x)

    def attend(self, x: jax.Array) -> jax.Array:
        """Return logits by the token table: [..., E] -> [..., V] in float32."""
        return self.embed.attend(x)


class Block(nn.Module):
    """One post-norm layer: attention, then feed-forward, each added to the residual stream, then normalised."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap | None, where: Where) -> tuple[jax.Array, None]:
        """Apply the layer to the residual stream: [B, T, D] -> [B, T, D]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        init = normal(cfg.init_std)
        inits: dict[str, Any] = {"kernel_init": init, "out_init": init, "dtype": dtype}
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))

        x = visit(self, tap, "block.resid_pre", x)
        attend = Attention(cfg.attention, name="attn", **inits)
        x = Norm(cfg.norm, dtype, name="norm_attn")(x + drop(attend(x, where, tap=tap)))
        x = visit(self, tap, "block.resid_mid", x)
        feed = MLP(cfg.mlp, name="mlp", **inits)
        x = Norm(cfg.norm, dtype, name="norm_mlp")(x + drop(feed(x, tap)))
        x = visit(self, tap, "block.resid_post", x)
        return constrain(x, "batch", "time", "width"), None
