"""The Vision Transformer (Dosovitskiy et al. 2021): a Transformer encoder over an image's patches.

Layers are pre-norm (erf-GELU, biases) with a final norm. The features are the [CLS] token or the mean over the patches.
The published weights of Google and of DeiT (Touvron et al. 2021) have [CLS] and a norm epsilon of 1e-6; transformers'
default is 1e-12.
DINOv2 (Oquab et al. 2024) scales each update by a learned vector (LayerScale, Touvron et al. 2021b), accepts images of
any size, and its giant model has a gated feed-forward layer (SwiGLU). With registers (Darcet et al. 2024) there are a
few learned tokens between [CLS] and the patches, where large models store what they would otherwise write over
uninformative patches. No feature uses them.
CLIP's image tower (Radford et al. 2021) also normalises the embeddings. SigLIP's (Zhai et al. 2023) has no [CLS]: its
features are what a learned query reads from the tokens by attention.

The recipe matters as much as the model. DeiT (table 9): AdamW, lr 5e-4 · batch/512, decay 0.05, 300 epochs, drop path
0.1, mixup 0.8, cutmix 1, RandAugment, random erasing, label smoothing 0.1. AugReg (Steiner et al. 2022, abstract):
augmentation and regularisation with more compute were worth ten times the data. Small widths need init_std 0: at
width 64, 100 steps on scanned digits reach 55 % from 0.02 and 89 % from 1/sqrt(64).

Dims: B batch, H height, W width, N tokens ([CLS], R registers, patches), D d_model, K head width, F d_ff, L layers.
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
from fm_jax.layers.dense import normal
from fm_jax.layers.drop_path import DropPath
from fm_jax.layers.mlp import MLP, MLPConfig
from fm_jax.layers.norm import Norm, NormConfig
from fm_jax.layers.patch_embed import PatchConfig, PatchEmbed
from fm_jax.layers.stack import Remat, stack
from fm_jax.layers.tap import SITES, Tap, visit

Pool = Literal["cls", "mean", "both", "mean_norm", "attention"]
"""How tokens become features.

cls: [CLS]; mean: mean of the normed patches; both: concatenated; mean_norm: norm of the patches' mean (MAE);
attention: what a learned query reads (`AttentionPool`).
"""


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    patches: PatchConfig
    num_layers: int
    d_model: int
    attention: AttentionConfig
    mlp: MLPConfig
    norm: NormConfig = NormConfig("layer", 1e-6)
    pool: Pool = "cls"  # how tokens are pooled to features
    registers: int = 0  # R: learned tokens between [CLS] and the patches, excluded from the features
    layer_scale: float = 0.0  # initial value of LayerScale; 0: no LayerScale
    norm_embed: bool = False  # normalise the embeddings too (CLIP)
    dropout: float = training(0.0)  # dropout rate of the embeddings and of each update to the residual stream
    drop_path: float = training(0.0)  # drop path rate of the last layer; linear from 0 at the first (timm, DeiT)
    init_std: float = training(0.02)  # 0: 1/sqrt(fan_in), for small widths
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32
    remat: Remat = training("none")

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("num_layers", "d_model"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.registers < 0:
            raise ConfigError(f"registers must be at least 0, not {self.registers}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.attention.causal or self.attention.rope is not None:
            raise ConfigError(
                "a ViT attends both ways, without rope; set attention.causal to false and attention.rope to none"
            )
        if self.pool in ("cls", "both") and not self.patches.cls:
            raise ConfigError(f"pool {self.pool!r} needs a [CLS] token; set patches.cls to true, or pool to 'mean'")

    @property
    def in_channels(self) -> int:
        """Return the number of image channels."""
        return self.patches.channels

    @property
    def front(self) -> int:
        """Return the number of tokens before the patches."""
        return self.patches.cls + self.registers


def vit(num_layers: int, d_model: int, num_heads: int, patch_size: int, image_size: int = 224) -> Config:
    """Return a model of the paper's form; heads are d_model / num_heads wide and the feed-forward layer 4 · d_model."""
    if d_model % num_heads:
        raise ConfigError(f"d_model {d_model} must be a multiple of num_heads {num_heads}")
    heads = AttentionConfig(num_heads, num_heads, d_model // num_heads, causal=False)
    patches = PatchConfig((image_size, image_size), patch_size)
    return Config(patches, num_layers, d_model, heads, MLPConfig(4 * d_model, "gelu"))


def dinov2(num_layers: int, d_model: int, num_heads: int, registers: int = 0) -> Config:
    """Return a model of DINOv2's form (its position table is for images of 518 × 518).

    The published models with registers have 4, and antialias when they interpolate positions.
    """
    cfg = vit(num_layers, d_model, num_heads, 14, 518)
    patches = replace(cfg.patches, any_size=True, resizing="antialiased" if registers else "bicubic")
    return replace(cfg, patches=patches, registers=registers, layer_scale=1e-5)


def dinov2_giant(registers: int = 0) -> Config:
    """Return DINOv2's largest model; its gated layer is two thirds of 4 · d_model wide."""
    return replace(dinov2(40, 1536, 24, registers), mlp=MLPConfig(4096, "silu", gated=True))


def tiny() -> Config:
    """Return a model for tests: 2 layers of width 32 on 8 × 8 images of 2 × 2 patches."""
    return replace(vit(2, 32, 4, 2, 8), init_std=0.0)


# Dosovitskiy et al. 2021, table 1; Ti and S of Touvron et al. 2021, table 1
vit_ti16 = partial(vit, 12, 192, 3, 16)  # 5.5 M
vit_s16 = partial(vit, 12, 384, 6, 16)  # 22 M
vit_s32 = partial(vit, 12, 384, 6, 32)  # 23 M
vit_b16 = partial(vit, 12, 768, 12, 16)  # 86 M
vit_b32 = partial(vit, 12, 768, 12, 32)  # 87 M
vit_l16 = partial(vit, 24, 1024, 16, 16)  # 303 M
vit_l32 = partial(vit, 24, 1024, 16, 32)  # 306 M
vit_h14 = partial(vit, 32, 1280, 16, 14)  # 631 M

# Oquab et al. 2024, table 17 (its 18 layers of the base model are 12 in the weights)
dinov2_small = partial(dinov2, 12, 384, 6)  # 22 M
dinov2_base = partial(dinov2, 12, 768, 12)  # 87 M
dinov2_large = partial(dinov2, 24, 1024, 16)  # 304 M


class ViT(nn.Module):
    """Images [B, H, W, channels] -> features [B, D] ([B, 2·D] with pool "both")."""

    cfg: Config

    sites = SITES

    def setup(self) -> None:
        """Declare the submodules."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        inits = normal(cfg.init_std), normal(cfg.init_std or 0.02)
        self.embed = PatchEmbed(cfg.patches, cfg.d_model, *inits, dtype, cfg.registers)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = stack(Block, cfg.num_layers, cfg.remat)(cfg)
        self.norm_final = Norm(cfg.norm, dtype)
        if cfg.norm_embed:
            self.norm_embed = Norm(cfg.norm, dtype)
        if cfg.pool == "attention":
            self.head = AttentionPool(cfg)

    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the features [B, D] (or [B, 2·D]) in float32 of images [B, H, W, channels]."""
        return self.features(image, tap=tap)

    def features(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Pool the hidden states by `cfg.pool`: [B, H, W, channels] -> [B, D] (or [B, 2·D]) in float32."""
        if self.cfg.pool == "mean_norm":
            mean = self._stream(image, None, tap)[:, self.cfg.front :].astype(jnp.float32).mean(axis=1, keepdims=True)
            return visit(self, tap, "final", self.norm_final(mean))[:, 0].astype(jnp.float32)
        if self.cfg.pool == "attention":
            return self.head(self.hidden(image, tap=tap)).astype(jnp.float32)
        hidden = self.hidden(image, tap=tap).astype(jnp.float32)
        patches = hidden[:, self.cfg.front :]
        if self.cfg.pool == "mean":
            return patches.mean(axis=1)
        return hidden[:, 0] if self.cfg.pool == "cls" else jnp.concatenate([hidden[:, 0], patches.mean(axis=1)], axis=1)

    def hidden(self, image: jax.Array, *, keep: jax.Array | None = None, tap: Tap | None = None) -> jax.Array:
        """Return the normalised tokens [B, N, D]: [CLS] and registers if the model has them, then patches.

        Args:
            image: images [B, H, W, channels], normalised as in training.
            keep: indices [B, K] of the patches to read; the others are not computed (He et al. 2022).
            tap: sites to read or edit.

        Raises:
            ConfigError: another number of channels, or a size that the model does not accept.
        """
        return visit(self, tap, "final", self.norm_final(self._stream(image, keep, tap)))

    def _stream(self, image: jax.Array, keep: jax.Array | None, tap: Tap | None) -> jax.Array:
        """Return the residual stream [B, N, D] after the last layer."""
        x = self.embed(image, keep)
        x = self.norm_embed(x) if self.cfg.norm_embed else x
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        x = constrain(visit(self, tap, "embed", x), "batch", "time", "width")
        x, _ = self.blocks(x, layered(self.cfg, tap), Where(jnp.arange(x.shape[1])[None]))
        return x


def layered(cfg: Config, tap: Tap | None) -> tuple[Tap | None, jax.Array]:
    """Return the per-layer inputs of a stack: the tap, and each layer's share [L] of the drop path rate."""
    return tap and tap.stacked(), jnp.linspace(0, 1, cfg.num_layers)


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, own: tuple[Tap | None, jax.Array], where: Where) -> tuple[jax.Array, None]:
        """Apply the layer to the residual stream: [B, N, D] -> [B, N, D]; `own` is a slice of `layered`."""
        cfg, dtype, (tap, share) = self.cfg, jnp.dtype(self.cfg.dtype), own
        init = normal(cfg.init_std)
        inits: dict[str, Any] = {"kernel_init": init, "out_init": init, "dtype": dtype}

        x = visit(self, tap, "block.resid_pre", x)
        attend = Attention(cfg.attention, name="attn", **inits)
        x = x + self._update("attn", attend(Norm(cfg.norm, dtype, name="norm_attn")(x), where, tap=tap), share)
        x = visit(self, tap, "block.resid_mid", x)
        feed = MLP(cfg.mlp, name="mlp", **inits)
        x = x + self._update("mlp", feed(Norm(cfg.norm, dtype, name="norm_mlp")(x), tap), share)
        x = visit(self, tap, "block.resid_post", x)
        return constrain(x, "batch", "time", "width"), None

    def _update(self, half: str, update: jax.Array, share: jax.Array) -> jax.Array:
        """Apply LayerScale, dropout and drop path to an update [B, N, D]; `share` [] is of the drop path rate."""
        cfg = self.cfg
        if cfg.layer_scale:
            start = nn.with_logical_partitioning(nn.initializers.constant(cfg.layer_scale), ("norm",))
            scale = self.param(f"scale_{half}", start, (cfg.d_model,), jnp.float32)
            update = update * scale.astype(update.dtype)[None, None]
        update = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))(update)
        return DropPath(cfg.drop_path)(update, share)


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, and a feed-forward layer follows: [B, N, D] -> [B, D].

    The query itself is not added to what it reads (Lee et al. 2019, equation 11; Zhai et al. 2022, section 3.2).
    """

    cfg: Config

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return the features [B, D] of normalised tokens [B, N, D]."""
        cfg, dtype, (batch, count, width) = self.cfg, jnp.dtype(self.cfg.dtype), hidden.shape
        init = normal(cfg.init_std)
        inits: dict[str, Any] = {"kernel_init": init, "out_init": init, "dtype": dtype}
        token = nn.with_logical_partitioning(normal(cfg.init_std or 0.02), ("embed",))
        probe = self.param("probe", token, (width,), jnp.float32)
        query = jnp.broadcast_to(probe.astype(dtype)[None, None], (batch, 1, width))
        x = CrossAttention(cfg.attention, name="attn", **inits)(query, hidden, jnp.full(batch, count, jnp.int32))
        x = x + MLP(cfg.mlp, name="mlp", **inits)(Norm(cfg.norm, dtype, name="norm")(x))
        return x[:, 0]
