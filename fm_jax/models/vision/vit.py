"""The Vision Transformer (Dosovitskiy et al. 2021): an image is a row of patches, read by a Transformer encoder.

Layers are normalised before each half (pre-norm, erf-GELU, biases) and once at the end. What a task reads is the token
in front ([CLS]) or the mean over the patches. The published weights of Google and of DeiT (Touvron et al. 2021) have
[CLS] and norms of epsilon 1e-6, transformers' config says 1e-12 unless told otherwise: it is a field.
DINOv2 (Oquab et al. 2024) scales each half's update by a learned vector (LayerScale, Touvron et al. 2021b), takes
images of any size, and in its giant form has a gated feed-forward layer (SwiGLU). With registers (Darcet et al. 2024)
a few learned tokens stand between [CLS] and the patches: large models keep there what they would else write over
patches of little meaning. No feature is read from them.

The recipe decides as much as the model does. DeiT (table 9): AdamW, lr 5e-4 · batch/512, decay 0.05, 300 epochs, drop
path 0.1, mixup 0.8, cutmix 1, RandAugment, random erasing, label smoothing 0.1. AugReg (Steiner et al. 2022, abstract):
more compute with augmentation and regularisation did what ten times the data did. Small widths want init_std 0: of
width 64, 100 steps on scanned digits reach 55 % from 0.02 and 89 % from 1/sqrt(64).

Dims: B batch, H height, W width, N tokens (patches, and in front [CLS] and R registers), D d_model, heads K wide,
F d_ff, L layers.
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
from fm_jax.layers.dense import normal
from fm_jax.layers.drop_path import DropPath
from fm_jax.layers.mlp import MLP, MLPConfig
from fm_jax.layers.norm import Norm, NormConfig
from fm_jax.layers.patch_embed import PatchConfig, PatchEmbed
from fm_jax.layers.stack import Remat, stack
from fm_jax.layers.tap import SITES, Tap, visit

Pool = Literal["cls", "mean", "both", "mean_norm"]
"""[CLS]; the mean over the normed patches; one behind the other; the norm of the mean over the patches (MAE's)."""


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    patches: PatchConfig
    num_layers: int
    d_model: int
    attention: AttentionConfig
    mlp: MLPConfig
    norm: NormConfig = NormConfig("layer", 1e-6)
    pool: Pool = "cls"  # what the features are
    registers: int = 0  # R: learned tokens between [CLS] and the patches, left out of every feature
    layer_scale: float = 0.0  # where the learned scale of each update starts; 0: there is none
    dropout: float = training(0.0)  # of the embeddings and of each update to the residual stream
    drop_path: float = training(0.0)  # rate of leaving out the last layer's updates; from 0 at the first (timm, DeiT)
    init_std: float = training(0.02)  # 0: 1/sqrt(fan_in), for small widths
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # of the computation, not of parameters
    remat: Remat = training("none")

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
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
                "attention.causal must be False and attention.rope None: patches see each other both ways"
            )
        if self.pool in ("cls", "both") and not self.patches.cls:
            raise ConfigError(f"pool {self.pool!r} reads a token in front: set patches.cls, or pool 'mean'")

    @property
    def in_channels(self) -> int:
        """Return how many channels an image has."""
        return self.patches.channels

    @property
    def front(self) -> int:
        """Return how many tokens stand before the patches."""
        return self.patches.cls + self.registers


def vit(num_layers: int, d_model: int, num_heads: int, patch_size: int, image_size: int = 224) -> Config:
    """Return a model of the paper's form; heads are d_model / num_heads wide and the feed-forward layer 4 · d_model."""
    if d_model % num_heads:
        raise ConfigError(f"d_model {d_model} must be a multiple of num_heads {num_heads}")
    heads = AttentionConfig(num_heads, num_heads, d_model // num_heads, causal=False)
    patches = PatchConfig((image_size, image_size), patch_size)
    return Config(patches, num_layers, d_model, heads, MLPConfig(4 * d_model, "gelu"))


def dinov2(num_layers: int, d_model: int, num_heads: int, registers: int = 0) -> Config:
    """Return a model of DINOv2's form (its table of positions is for images of 518 × 518).

    Those published with registers have 4, and resize their positions otherwise.
    """
    cfg = vit(num_layers, d_model, num_heads, 14, 518)
    patches = replace(cfg.patches, any_size=True, resizing="antialiased" if registers else "bicubic")
    return replace(cfg, patches=patches, registers=registers, layer_scale=1e-5)


def dinov2_giant(registers: int = 0) -> Config:
    """Return DINOv2's largest model; its gated layer keeps two thirds of 4 · d_model."""
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
    """Images [B, H, W, channels] -> features [B, D] (2·D where both are pooled)."""

    cfg: Config

    sites = SITES

    def setup(self) -> None:
        """Declare the pieces."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        inits = normal(cfg.init_std), normal(cfg.init_std or 0.02)
        self.embed = PatchEmbed(cfg.patches, cfg.d_model, *inits, dtype, cfg.registers)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = stack(Block, cfg.num_layers, cfg.remat)(cfg)
        self.norm_final = Norm(cfg.norm, dtype)

    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the features, as `features` does."""
        return self.features(image, tap=tap)

    def features(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return one vector an image, in float32: what `cfg.pool` names of the hidden states."""
        if self.cfg.pool == "mean_norm":
            mean = self._stream(image, None, tap)[:, self.cfg.front :].astype(jnp.float32).mean(axis=1, keepdims=True)
            return visit(self, tap, "final", self.norm_final(mean))[:, 0].astype(jnp.float32)
        hidden = self.hidden(image, tap=tap).astype(jnp.float32)
        patches = hidden[:, self.cfg.front :]
        if self.cfg.pool == "mean":
            return patches.mean(axis=1)
        return hidden[:, 0] if self.cfg.pool == "cls" else jnp.concatenate([hidden[:, 0], patches.mean(axis=1)], axis=1)

    def hidden(self, image: jax.Array, *, keep: jax.Array | None = None, tap: Tap | None = None) -> jax.Array:
        """Return the normalised tokens [B, N, D], [CLS] first and registers next where the model has them.

        Args:
            image: [B, H, W, channels], normalised as the model's data were.
            keep: [B, K], numbers of the patches to read; nothing is computed of the others (He et al. 2022).
            tap: what to read or edit at named sites.

        Raises:
            ConfigError: another number of channels, or a size that the model does not take.
        """
        return visit(self, tap, "final", self.norm_final(self._stream(image, keep, tap)))

    def _stream(self, image: jax.Array, keep: jax.Array | None, tap: Tap | None) -> jax.Array:
        """Return the residual stream [B, N, D] behind the last layer."""
        x = self.dropout(self.embed(image, keep), deterministic=not self.has_rng("dropout"))
        x = constrain(visit(self, tap, "embed", x), "batch", "time", "width")
        x, _ = self.blocks(x, layered(self.cfg, tap), Where(jnp.arange(x.shape[1])[None]))
        return x


def layered(cfg: Config, tap: Tap | None) -> tuple[Tap | None, jax.Array]:
    """Return what each layer of a stack gets of its own: its part of the tap, and its share of the drop path's rate."""
    return tap and tap.stacked(), jnp.linspace(0, 1, cfg.num_layers)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each read through a norm and added to the residual stream."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, own: tuple[Tap | None, jax.Array], where: Where) -> tuple[jax.Array, None]:
        """Carry the residual stream [B, N, D] through the layer; `own` is `layered`'s."""
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
        """Return what a half adds to the stream: its output, scaled, and in training dropped in part or whole."""
        cfg = self.cfg
        if cfg.layer_scale:
            start = nn.with_logical_partitioning(nn.initializers.constant(cfg.layer_scale), ("norm",))
            scale = self.param(f"scale_{half}", start, (cfg.d_model,), jnp.float32)
            update = update * scale.astype(update.dtype)[None, None]
        update = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))(update)
        return DropPath(cfg.drop_path)(update, share)
