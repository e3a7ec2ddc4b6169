"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): a tower for images and one for texts, whose vectors meet.

An image and a text that belong together have a large cosine. So a text describes a class, and the nearest of several
texts classifies an image without training on the classes (zero-shot).

CLIP's image tower is a ViT with quick-GELU, a norm of the embeddings and patches without bias; its text tower is a
causal Transformer, read at the text's end token. Both vectors are projected without bias. Cosines are multiplied by
exp(scale), a learned number that starts at 1/0.07 and is kept at 100 or less (`optim/bounds.py`).
SigLIP's text tower attends both ways and is read at the last position, padding included: texts must be padded to
`max_length` and padding is a token like any other. A learned query reads the image. Since its loss judges every pair by
itself, the logits also need a learned bias.

Published weights differ from these random ones in small ways: OpenAI's text positions start with deviation 0.01 (here
0.02) and the first half of the text's feed-forward layer with 1/sqrt(2·D) (here 1/sqrt(D)).

The paper's recipe: batch 32,768, 32 epochs, AdamW with decay 0.2 (not of vectors), b2 0.98, eps 1e-6, rate 5e-4 (B/32,
B/16) or 4e-4 (L/14), warm-up 2,000 steps, cosine, random square crops only.

Dims: B images and as many texts, H height, W width, T time, D a tower's width, P the width of the vectors.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import check_least, training
from fm_jax.core.errors import ConfigError
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.norm import NormConfig
from fm_jax.layers.patch_embed import PatchConfig
from fm_jax.layers.readout import pool
from fm_jax.layers.tap import IMAGE, SITES, Tap
from fm_jax.models.language import decoder
from fm_jax.models.vision import vit

Read = Literal["end", "largest", "last"]
"""Where a text is read: its first end token; its largest id (CLIP's end token is its last id); the last position."""


@dataclass(frozen=True)
class Config:
    """Sizes of both towers and form of what joins them."""

    image: vit.Config
    text: decoder.Config
    width: int  # P
    form: Literal["clip", "siglip"] = "clip"  # siglip: the image is not projected, text and logits have a bias
    read: Read = "end"
    end_id: int = 49407  # the end token, which `read` "end" looks for
    start_scale: float = training(math.log(1 / 0.07))  # initial logarithm of the cosines' factor
    start_bias: float = training(-10.0)  # initial bias of SigLIP's logits

    def __post_init__(self) -> None:
        """Check that the towers fit each other."""
        check_least(self, width=1, end_id=0)
        if self.form == "siglip" and self.width != self.image.d_model:
            raise ConfigError(
                f"width {self.width} must be image.d_model {self.image.d_model}: form siglip does not project images"
            )
        if not self.text.tied:
            raise ConfigError("text.tied is false, but the text tower has no head; set it to true")

    @property
    def in_channels(self) -> int:
        """Return the number of image channels."""
        return self.image.in_channels

    @property
    def patches(self) -> PatchConfig:
        """Return how images are cut."""
        return self.image.patches

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.text.vocab_size

    @property
    def max_length(self) -> int:
        """Return the length of the longest text."""
        return self.text.max_length


def clip(image: vit.Config, text_width: int, text_heads: int, width: int) -> Config:
    """Return a model of CLIP's form around a ViT; the text tower has 12 layers, and texts of 77 tokens."""
    norm, text = NormConfig("layer", 1e-5), decoder.gpt(12, text_width, text_heads, 49408, 77)
    image = replace(
        image,
        patches=replace(image.patches, bias=False),
        mlp=replace(image.mlp, activation="quick_gelu"),
        norm=norm,
        norm_embed=True,
        init_std=0.0,
    )
    text = replace(text, mlp=replace(text.mlp, activation="quick_gelu"), norm=norm, init_std=0.0)
    return Config(image, text, width)


def siglip(image: vit.Config, num_layers: int, num_heads: int, vocab_size: int = 32000) -> Config:
    """Return a model of SigLIP's form: a text tower as wide as the image's, and texts of exactly 64 tokens."""
    width, norm = image.d_model, NormConfig("layer", 1e-6)
    text = decoder.gpt(num_layers, width, num_heads, vocab_size, 64)
    text = replace(text, attention=replace(text.attention, causal=False), norm=norm, init_std=0.0)
    image = replace(
        image,
        patches=replace(image.patches, cls=False),
        mlp=replace(image.mlp, activation="gelu_tanh"),
        norm=norm,
        pool="attention",
        init_std=0.0,
    )
    return Config(image, text, width, "siglip", "last", start_scale=math.log(10.0))


def tiny() -> Config:
    """Return a model for tests: towers of 2 layers of width 32, texts of 16 tokens, vectors of 16."""
    cfg = clip(vit.tiny(), 32, 4, 16)
    return replace(cfg, text=replace(cfg.text, num_layers=2, vocab_size=96, max_length=16), end_id=95)


# Radford et al. 2021, table 20
clip_b32 = partial(clip, vit.vit_b32(), 512, 8, 512)  # 151 M
clip_b16 = partial(clip, vit.vit_b16(), 512, 8, 512)  # 150 M
clip_l14 = partial(clip, vit.vit(24, 1024, 16, 14), 768, 12, 768)  # 428 M
clip_l14_336 = partial(clip, vit.vit(24, 1024, 16, 14, 336), 768, 12, 768)  # 428 M

siglip_b16 = partial(siglip, vit.vit_b16(), 12, 12)  # 203 M; Zhai et al. 2023, section 4


class Embedded(NamedTuple):
    """What both towers give, and the numbers that make logits of cosines (`objectives/image_text.py`)."""

    image: jax.Array  # [B, P] float32, of length 1
    text: jax.Array  # [B, P] float32, of length 1
    scale: jax.Array  # [], the cosines' factor (its exponential is taken)
    bias: jax.Array  # [], added to the logits; 0 for CLIP


class CLIP(nn.Module):
    """Images [B, H, W, channels] and tokens [B, T] -> their vectors [B, P]; parameters "image/…" and "text/…"."""

    cfg: Config

    sites = (*(IMAGE + site for site in SITES), *SITES)

    def setup(self) -> None:
        """Declare the towers and the two numbers."""
        cfg = self.cfg
        self.image, self.text = image_tower(cfg), text_tower(cfg)
        self.scale = self.param("scale", _number(cfg.start_scale), (), jnp.float32)
        if cfg.form == "siglip":
            self.bias = self.param("bias", _number(cfg.start_bias), (), jnp.float32)

    def __call__(self, image: jax.Array, tokens: jax.Array, *, tap: Tap | None = None) -> Embedded:
        """Return the vectors of images [B, H, W, channels] and of texts [B, T].

        Args:
            image: images, normalised as in training.
            tokens: ids, padded at the end. CLIP's padding changes nothing; SigLIP's texts are of one length.
            tap: sites to read or edit; the image tower's have the prefix "image.".

        Raises:
            ConfigError: the image tower does not accept the images, or the texts are too long.
        """
        bias = self.bias if self.cfg.form == "siglip" else jnp.zeros(())
        return Embedded(self.features(image, tap=tap), self.text_features(tokens, tap=tap), jnp.exp(self.scale), bias)

    def features(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the vectors [B, P] of length 1, in float32, of images [B, H, W, channels]."""
        return _unit(self.image(image, tap=tap and tap.inside(IMAGE)))

    def text_features(self, tokens: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the vectors [B, P] of length 1, in float32, of texts [B, T]."""
        return _unit(self.text(tokens, tap=tap))


class ImageTower(nn.Module):
    """Images [B, H, W, channels] -> vectors [B, P] (`out` 0: the ViT's features [B, D]), in float32, of any length."""

    backbone: vit.ViT
    out: int

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the projection adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the vectors [B, P] of images [B, H, W, channels]."""
        return _project(self.backbone.features(image, tap=tap), self.out, bias=False)


class TextTower(nn.Module):
    """Tokens [B, T] -> vectors [B, P] (`out` 0: the state that is read, [B, D]), in float32, of any length.

    The backbone's head is not used.
    """

    backbone: decoder.Decoder
    out: int
    read: Read = "end"
    end_id: int = 49407
    bias: bool = False  # of the projection

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the projection adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(self, tokens: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the vectors [B, P] of tokens [B, T].

        Raises:
            ConfigError: a text longer than the backbone's max_length.
        """
        hidden = self.backbone.hidden(tokens, tap=tap)
        return _project(pool(hidden, places(tokens, self.read, self.end_id) + 1, "last"), self.out, bias=self.bias)


def image_tower(cfg: Config) -> ImageTower:
    """Return the image tower alone; its parameters are at "image" in those of the whole."""
    return ImageTower(vit.ViT(cfg.image, parent=None), cfg.width if cfg.form == "clip" else 0)


def text_tower(cfg: Config) -> TextTower:
    """Return the text tower alone; its parameters are at "text" in those of the whole."""
    return TextTower(decoder.Decoder(cfg.text, parent=None), cfg.width, cfg.read, cfg.end_id, cfg.form == "siglip")


def places(tokens: jax.Array, read: Read, end_id: int) -> jax.Array:
    """Return the position [B] at which each text [B, T] is read.

    A text without its end token is read at position 0, as in transformers: keep the token when texts are cut
    (`data/text/captions.py`).
    """
    if read == "last":
        return jnp.full(tokens.shape[0], tokens.shape[1] - 1)
    return jnp.argmax(tokens if read == "largest" else tokens == end_id, axis=1)


def _project(x: jax.Array, out: int, *, bias: bool) -> jax.Array:
    """Declare the calling module's projection: [B, D] -> [B, out]; nothing for `out` 0."""
    if not out:
        return x
    how: dict[str, Any] = {"bias": bias, "init": normal(0.0), "dtype": jnp.float32, "name": "project"}
    projected: jax.Array = dense(out, ("embed", None), **how)(x)
    return projected


def _unit(x: jax.Array) -> jax.Array:
    # The lower bound is inside the root, so that a row of zeros has a finite gradient.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def _number(start: float) -> Any:
    return nn.with_logical_partitioning(nn.initializers.constant(start), ())
