"""The masked autoencoder (He et al. 2022): an encoder reads a quarter of the patches, a decoder predicts the others.

The mask is random for each image. The encoder (any `vit.ViT`) reads only the kept patches, which reduces its cost. The
decoder is narrow and shallow; it gets a learned mask token for each masked patch and its own positions. As in the
paper, both position tables are fixed sines and cosines if the ViT's are ("sincos"). The targets are a patch's pixels
standardised to mean 0 and variance 1 (`standardise`), which gives better features and worse reconstructions.

Parameters are "backbone/…" and "decoder/…": `checkpoint/surgery.load` copies the first into any model with the same
backbone (with `positions="learned"` to train the table further, as in the paper's finetuning).

Recipe (He et al. 2022, table 8): AdamW 0.9/0.95, lr 1.5e-4 · batch/256, batch 4096, decay 0.05, 40 epochs of warm-up,
cosine, 800 or 1600 epochs, random crops and flips only.

Dims: B batch, H height, W width, C channels, N patches, K kept patches, P = p·p·C values per patch, D encoder width,
E decoder width.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.layers.attention import AttentionConfig, Where
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import Norm
from fm_jax.layers.patch_embed import positions
from fm_jax.layers.stack import stack
from fm_jax.layers.tap import ENCODER, SITES, Tap, visit
from fm_jax.models.vision import vit
from fm_jax.ops import patches as ops
from fm_jax.ops import random_masking
from fm_jax.ops.random_masking import Masking


@dataclass(frozen=True)
class Config:
    """Masking and decoder; norms, dtype and other settings are the encoder's."""

    num_layers: int
    d_model: int
    attention: AttentionConfig
    mlp: MLPConfig
    mask_ratio: float = 0.75  # share of the patches that are masked
    standardise: bool = True  # standardise each target patch to mean 0 and variance 1

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if min(self.num_layers, self.d_model) < 1:
            raise ConfigError(
                f"the decoder's num_layers and d_model must be at least 1, not {self.num_layers} and {self.d_model}"
            )
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio must be in (0, 1), not {self.mask_ratio}")


def decoder(num_layers: int = 8, d_model: int = 512, num_heads: int = 16) -> Config:
    """Return a decoder; the default is the paper's for every encoder."""
    if d_model % num_heads:
        raise ConfigError(f"d_model {d_model} must be a multiple of num_heads {num_heads}")
    heads = AttentionConfig(num_heads, num_heads, d_model // num_heads, causal=False)
    return Config(num_layers, d_model, heads, MLPConfig(4 * d_model, "gelu"))


def encoder(cfg: vit.Config) -> vit.Config:
    """Return a ViT's config with the fixed positions of the paper's encoders."""
    return replace(cfg, patches=replace(cfg.patches, positions="sincos"))


def mae_base() -> tuple[Config, vit.Config]:
    """Return decoder and encoder of ViT-B/16 (112 M parameters, 86 M of them in the encoder)."""
    return decoder(), encoder(vit.vit_b16())


def mae_large() -> tuple[Config, vit.Config]:
    """Return decoder and encoder of ViT-L/16."""
    return decoder(), encoder(vit.vit_l16())


def mae_huge() -> tuple[Config, vit.Config]:
    """Return decoder and encoder of ViT-H/14."""
    return decoder(), encoder(vit.vit_h14())


class Reconstruction(NamedTuple):
    """Predictions, targets and the mask."""

    prediction: jax.Array  # [B, N, P] float32, for all patches
    target: jax.Array  # [B, N, P] float32
    removed: jax.Array  # [B, N] bool, the masked patches


class MAE(nn.Module):
    """Images [B, H, W, C] -> predicted patches [B, N, P]."""

    cfg: Config
    backbone: vit.ViT

    sites = (*(ENCODER + site for site in SITES), *SITES)

    def setup(self) -> None:
        """Declare the decoder; the backbone is passed in."""
        base, cfg = self.backbone.cfg, self.cfg
        self.decoder = Decoder(
            replace(
                base,
                num_layers=cfg.num_layers,
                d_model=cfg.d_model,
                attention=cfg.attention,
                mlp=cfg.mlp,
                registers=0,
                layer_scale=0.0,
                dropout=0.0,
                drop_path=0.0,
            )
        )

    def __call__(self, image: jax.Array, noise: jax.Array | None = None, *, tap: Tap | None = None) -> jax.Array:
        """Return the predictions [B, N, P] of all patches of images [B, H, W, C]; arguments as of `reconstruct`."""
        return self.reconstruct(image, noise, tap=tap).prediction

    def reconstruct(
        self, image: jax.Array, noise: jax.Array | None = None, *, tap: Tap | None = None
    ) -> Reconstruction:
        """Mask patches and predict all of them.

        Args:
            image: images [B, H, W, C].
            noise: noise [B, N]; the patches with the smallest are kept. None: random, from the rng "mask".
            tap: sites to read or edit; the encoder's have the prefix "encoder.".

        Raises:
            ConfigError: the backbone does not accept the images, or there are too few patches for the ratio.
        """
        cut = self.backbone.cfg.patches
        grid = cut.grid_of(image)
        masking = self._mask(image, noise, grid)
        latent = self.backbone.hidden(image, keep=masking.keep, tap=tap and tap.inside(ENCODER))
        if self.backbone.cfg.registers:  # registers have no position: the decoder does not read them
            latent = jnp.concatenate([latent[:, : int(cut.cls)], latent[:, self.backbone.cfg.front :]], axis=1)
        target = ops.patchify(image.astype(jnp.float32), cut.patch_size)
        if self.cfg.standardise:
            target = ops.standardise(target)[0]
        return Reconstruction(self.decoder(latent, masking, grid, tap), target, masking.removed)

    def inpaint(self, image: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Return images [B, H, W, C] in which predictions replace the masked patches.

        Standardised predictions get the true patch's mean and variance back.
        """
        cut = self.backbone.cfg.patches
        made, true = self.reconstruct(image, noise), ops.patchify(image.astype(jnp.float32), cut.patch_size)
        predicted = made.prediction
        if self.cfg.standardise:
            _, mean, scale = ops.standardise(true)
            predicted = predicted * scale + mean
        return ops.unpatchify(jnp.where(made.removed[..., None], predicted, true), cut.patch_size, cut.grid_of(image))

    def _mask(self, image: jax.Array, noise: jax.Array | None, grid: ops.Grid) -> Masking:
        count = grid[0] * grid[1]
        kept = random_masking.count_kept(count, self.cfg.mask_ratio)
        if noise is None:
            noise = random_masking.noise(self.make_rng("mask"), image, count)
        elif noise.shape != (image.shape[0], count):
            raise ConfigError(f"noise must be [{image.shape[0]}, {count}], one per patch, not {list(noise.shape)}")
        return random_masking.mask(noise, kept)


class Decoder(nn.Module):
    """Latent tokens [B, K + 1, D] of the kept patches -> predictions [B, N, P] of all patches."""

    cfg: vit.Config  # with the encoder's patches

    @nn.compact
    def __call__(self, latent: jax.Array, masking: Masking, grid: ops.Grid, tap: Tap | None = None) -> jax.Array:
        """Predict all patches from latent tokens [B, K + 1, D]: [B, N, P] in float32."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = Refill(cfg, name="embed")(latent, masking, grid)
        x = constrain(visit(self, tap, "embed", x), "batch", "time", "width")
        blocks = stack(vit.Block, cfg.num_layers, cfg.remat)(cfg, name="blocks")
        x, _ = blocks(x, vit.layered(cfg, tap), Where(jnp.arange(x.shape[1])[None]))
        x = visit(self, tap, "final", Norm(cfg.norm, dtype, name="norm_final")(x))
        pixels = cfg.patches.patch_size**2 * cfg.patches.channels
        wide: dict[str, Any] = {"bias": True, "dtype": dtype, "out_dtype": jnp.float32}
        head = dense(pixels, ("embed", None), init=normal(cfg.init_std), name="head", **wide)
        return head(x[:, int(cfg.patches.cls) :]).astype(jnp.float32)


class Refill(nn.Module):
    """Put kept tokens back in place, a learned mask token at masked places, and add positions."""

    cfg: vit.Config

    @nn.compact
    def __call__(self, latent: jax.Array, masking: Masking, grid: ops.Grid) -> jax.Array:
        """Return the decoder's input: [B, K + 1, D] -> [B, N + 1, E], [CLS] first."""
        cfg, dtype, first = self.cfg, jnp.dtype(self.cfg.dtype), int(self.cfg.patches.cls)
        x = dense(cfg.d_model, (None, "embed"), bias=True, init=normal(cfg.init_std), dtype=dtype, name="project")(
            latent
        )
        token = nn.with_logical_partitioning(normal(cfg.init_std or 0.02), ("embed",))
        mask = self.param("mask", token, (cfg.d_model,), jnp.float32)
        table = positions(self, cfg.patches, cfg.d_model, grid, normal(cfg.init_std or 0.02))
        patches = random_masking.restore(x[:, first:], masking, mask.astype(dtype))
        return jnp.concatenate([x[:, :first], patches], axis=1) + table.astype(dtype)[None]
