"""YOLOX (Ge et al. 2021), a one-stage detector without anchor boxes.

A CSPDarknet gives feature maps with strides 8, 16 and 32, a pyramid mixes them from coarse to fine and back (PAFPN, Liu
et al. 2018), and a head that all maps have one of each predicts a box, whether there is an object, and its class, in
two branches. The stem ("Focus") turns 2×2 pixels into channels. In nano every 3×3 convolution but the stem's is
depthwise separable. Every convolution but the last ones has a batch normalisation and SiLU after it.

The public weights were trained on images of 0 … 255: `MEAN` and `STD` make these of images in [0, 1]. (Their channels
were blue, green, red; ours are red, green, blue, and `hub/vision/yolox.py` turns the stem's kernel.) Kernels begin as
torch's do, and the last biases so that every anchor point is sure of nothing (Lin et al. 2017, section 4.1). Batch norm
has the momentum 0.97 and the epsilon 1e-3 of the authors' experiments.

Recipe (their `yolox_base.py`): SGD with Nesterov momentum 0.9, lr 0.01 · batch/64, decay 5e-4 on kernels, 300 epochs,
5 of warm-up, cosine to 5 % and 15 at the end without mosaic and mixup and with L1; EMA 0.9998.

Dims: B batch, H height, W width, C classes, F channels, A anchor points of the three maps.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import precision, training
from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.layers.batch_norm import BatchNorm
from fm_jax.layers.conv import Depthwise, check_images, conv
from fm_jax.layers.stack import rematerialised
from fm_jax.layers.tap import Tap, stages, visit
from fm_jax.ops import anchor_points
from fm_jax.ops.boxes import Detections, nms

STRIDES = (8, 16, 32)  # pixels between the anchor points of each map
MEAN, STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # of pixel values in [0, 1]
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default
_LEVELS = (1, 2, 3)  # of the pyramid, fine to coarse


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    num_classes: int = 80
    depth: int = 1  # bottlenecks of a short stage; a long one has three times as many
    width: int = 32  # channels of the stem; the last map has 16 times as many
    depthwise: bool = False  # 3×3 convolutions are depthwise ones followed by 1×1
    in_channels: int = 3
    prior: float = training(0.01)  # probability of an object, and of each class, that the head starts with
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.97  # share of the old running moments at each step
    remat: Literal["none", "full"] = training("none")  # whether the backward pass computes the blocks again
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("num_classes", "depth", "width", "in_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.prior < 1:
            raise ConfigError(f"prior must be in (0, 1), not {self.prior}")
        if self.norm_epsilon <= 0 or not 0 <= self.norm_momentum < 1:
            raise ConfigError(
                f"norm_epsilon must be above 0 and norm_momentum in [0, 1), not {self.norm_epsilon}, "
                f"{self.norm_momentum}"
            )


def tiny() -> Config:
    """Return a model for tests: 8 channels in the stem and 3 classes (0.56 M parameters)."""
    return Config(num_classes=3, width=8)


# Ge et al. 2021, tables 3 and 4 (numbers of parameters with 80 classes)
yolox_nano = partial(Config, depth=1, width=16, depthwise=True)  # 0.91 M
yolox_tiny = partial(Config, depth=1, width=24)  # 5.06 M
yolox_s = partial(Config, depth=1, width=32)  # 9.0 M
yolox_m = partial(Config, depth=2, width=48)  # 25.3 M
yolox_l = partial(Config, depth=3, width=64)  # 54.2 M
yolox_x = partial(Config, depth=4, width=80)  # 99.1 M


class Raw(NamedTuple):
    """What the model predicts at every anchor point: the finest map first, each row by row."""

    boxes: jax.Array  # [B, A, 4], offsets of the box (`anchor_points.decode`)
    objectness: jax.Array  # [B, A], logits
    classes: jax.Array  # [B, A, C], logits


def detect(
    raw: Raw, size: tuple[int, int], *, score: float = 0.01, overlap: float = 0.65, limit: int = 100
) -> Detections:
    """Return the objects that raw predictions mean, best first.

    An anchor point stands for its likeliest class. Of two boxes of one class that overlap the better one is kept.

    Args:
        raw: the model's output.
        size: height and width of the images that the model read.
        score: least probability of an object times that of its class.
        overlap: largest IoU of two kept boxes of one class.
        limit: K, the most objects of an image.

    Returns:
        Boxes [B, K, 4] (left, top, right, bottom) in pixels of those images.
    """
    boxes = anchor_points.decode(raw.boxes.astype(jnp.float32), anchor_points.points(*size, STRIDES))
    logits, labels = raw.classes.max(axis=-1), raw.classes.argmax(axis=-1).astype(jnp.int32)
    scores = jax.nn.sigmoid(raw.objectness) * jax.nn.sigmoid(logits)

    def one(boxes: jax.Array, scores: jax.Array, labels: jax.Array) -> Detections:
        candidates = jnp.where(scores >= score, scores, -jnp.inf)
        kept, valid = nms(boxes, candidates, overlap, limit, groups=labels)
        found = Detections(boxes[kept], scores[kept], labels[kept], valid)
        masks = (valid.reshape(-1, *(1,) * (part.ndim - 1)) for part in found)
        # zeros of each part's own dtype: a Python 0 would turn the mask `valid` into integers
        return Detections(*(jnp.where(on, part, jnp.zeros_like(part)) for on, part in zip(masks, found, strict=True)))

    return jax.vmap(one)(boxes, scores, labels)


class YOLOX(nn.Module):
    """Images [B, H, W, in_channels] -> raw predictions at A anchor points."""

    cfg: Config

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the sites: stem, stages, the pyramid's maps, and box, objectness and classes [B, A, 5 + C]."""
        *trunk, last = stages(4)
        return (*trunk, *(f"pyramid.level{level}" for level in _LEVELS), last)

    @nn.compact
    def __call__(self, images: jax.Array, *, tap: Tap | None = None) -> Raw:
        """Return the raw predictions in float32 of images [B, H, W, in_channels].

        Raises:
            ConfigError: the images have another number of channels, or sides that are not multiples of 32.
        """
        cfg = self.cfg
        check_images(images, cfg.in_channels)
        anchor_points.points(images.shape[1], images.shape[2], STRIDES)  # refuses other sizes
        x = _focus(images.astype(jnp.dtype(cfg.dtype)))
        x = visit(self, tap, "embed", Unit(cfg, cfg.width, 3, axes=(None, "embed"), name="stem")(x))
        maps = list[jax.Array]()
        for stage, blocks in enumerate((cfg.depth, 3 * cfg.depth, 3 * cfg.depth, cfg.depth), 1):
            x = Stage(cfg, cfg.width * 2**stage, blocks, last=stage == 4, name=f"stage{stage}")(x)
            x = visit(self, tap, f"conv.stage{stage}", x)
            maps.append(x)
        levels = Pyramid(cfg, name="pyramid")(*maps[1:])
        found = list[jax.Array]()
        for level, x in zip(_LEVELS, levels, strict=True):
            x = visit(self, tap, f"pyramid.level{level}", x)
            found.append(Head(cfg, name=f"head{level}")(x))
        out = visit(self, tap, "final", jnp.concatenate(found, axis=1))
        return Raw(out[..., :4], out[..., 4], out[..., 5:])


class Stage(nn.Module):
    """Halve the map and mix it: [B, H, W, F] -> [B, H/2, W/2, width]."""

    cfg: Config
    width: int
    blocks: int
    last: bool  # pools over windows first, and has bottlenecks without shortcuts

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the stage: [B, H, W, F] -> [B, H/2, W/2, width]."""
        x = wide(self.cfg, self.width, stride=2, name="down")(x)
        if self.last:
            x = Windows(self.cfg, self.width, name="windows")(x)
        csp = rematerialised(CSP, self.cfg.remat)
        return csp(self.cfg, self.width, self.blocks, shortcut=not self.last, name="csp")(x)


class Pyramid(nn.Module):
    """PAFPN: mix three maps from coarse to fine, then from fine to coarse; each keeps its shape."""

    cfg: Config

    @nn.compact
    def __call__(self, fine: jax.Array, middle: jax.Array, coarse: jax.Array) -> tuple[jax.Array, ...]:
        """Mix [B, H, W, F], [B, H/2, W/2, 2F] and [B, H/4, W/4, 4F] to maps of the same shapes."""
        cfg = self.cfg
        narrow, medium, broad = (x.shape[-1] for x in (fine, middle, coarse))
        mix = partial(rematerialised(CSP, cfg.remat), cfg, blocks=cfg.depth, shortcut=False)
        top = Unit(cfg, medium, 1, name="reduce2")(coarse)
        mixed = mix(medium, name="down2")(jnp.concatenate([_doubled(top), middle], axis=-1))
        side = Unit(cfg, narrow, 1, name="reduce1")(mixed)
        first = mix(narrow, name="down1")(jnp.concatenate([_doubled(side), fine], axis=-1))
        up = wide(cfg, narrow, stride=2, name="halve1")(first)
        second = mix(medium, name="up1")(jnp.concatenate([up, side], axis=-1))
        up = wide(cfg, medium, stride=2, name="halve2")(second)
        third = mix(broad, name="up2")(jnp.concatenate([up, top], axis=-1))
        return first, second, third


class Head(nn.Module):
    """Predict at every place of a map: [B, H, W, F] -> offsets, objectness and classes [B, H·W, 5 + C] in float32."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply both branches: [B, H, W, F] -> [B, H·W, 5 + C]."""
        cfg = self.cfg
        width = 4 * cfg.width
        x = Unit(cfg, width, 1, name="stem")(x)
        classes = boxes = x
        for layer in (1, 2):
            classes = wide(cfg, width, name=f"classes{layer}")(classes)
            boxes = wide(cfg, width, name=f"boxes{layer}")(boxes)
        unsure = nn.initializers.constant(-math.log((1 - cfg.prior) / cfg.prior))
        last: dict[str, Any] = {"bias": True, "init": _INIT, "dtype": jnp.dtype(cfg.dtype)}
        found = [
            conv(4, 1, ("embed", None), name="box", **last)(boxes),
            conv(1, 1, ("embed", None), name="object", bias_init=unsure, **last)(boxes),
            conv(cfg.num_classes, 1, ("embed", "classes"), name="class", bias_init=unsure, **last)(classes),
        ]
        out = jnp.concatenate(found, axis=-1).astype(jnp.float32)
        return out.reshape(len(out), -1, out.shape[-1])


class CSP(nn.Module):
    """Bottlenecks on one half of the channels: [B, H, W, F] -> [B, H, W, width] (Wang et al. 2020)."""

    cfg: Config
    width: int
    blocks: int
    shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the bottlenecks to one half: [B, H, W, F] -> [B, H, W, width]."""
        cfg, half = self.cfg, self.width // 2
        changed, kept = Unit(cfg, half, 1, name="changed")(x), Unit(cfg, half, 1, name="kept")(x)
        for block in range(self.blocks):
            out = Unit(cfg, half, 1, name=f"block{block}_narrow")(changed)
            out = wide(cfg, half, name=f"block{block}_wide")(out)
            changed = changed + out if self.shortcut else out
        out = Unit(cfg, self.width, 1, axes=("mlp", "embed"), name="mix")(jnp.concatenate([changed, kept], axis=-1))
        return constrain(out, "batch", None, None, "width")


class Windows(nn.Module):
    """Largest values in windows of 1, 5, 9 and 13 (SPP, He et al. 2014): [B, H, W, F] -> [B, H, W, width]."""

    cfg: Config
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool in every window and mix: [B, H, W, F] -> [B, H, W, width]."""
        found = [Unit(self.cfg, x.shape[-1] // 2, 1, name="narrow")(x)]
        for _ in range(3):  # the maximum in a window of 5 of maxima in windows of 5 is that in a window of 9
            rows = nn.max_pool(found[-1], (5, 1), padding=((2, 2), (0, 0)))
            found.append(nn.max_pool(rows, (1, 5), padding=((0, 0), (2, 2))))
        return Unit(self.cfg, self.width, 1, axes=("mlp", "embed"), name="mix")(jnp.concatenate(found, axis=-1))


class Unit(nn.Module):
    """Convolution, batch normalisation, SiLU: [B, H, W, F] -> [B, H', W', width]."""

    cfg: Config
    width: int
    size: int
    stride: int = 1
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    depthwise: bool = False  # each channel has its own filter, and width is that of the input

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the three: [B, H, W, F] -> [B, H', W', width]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if self.depthwise:
            x = Depthwise(self.size, self.stride, kernel_init=_INIT, dtype=dtype, name="conv")(x)
        else:
            x = conv(self.width, self.size, self.axes, stride=self.stride, init=_INIT, dtype=dtype, name="conv")(x)
        return jax.nn.silu(BatchNorm(cfg.norm_epsilon, cfg.norm_momentum, dtype=dtype, name="norm")(x))


class Separable(nn.Module):
    """A depthwise 3×3 convolution, then one of 1×1, each a `Unit`: [B, H, W, F] -> [B, H', W', width]."""

    cfg: Config
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply both: [B, H, W, F] -> [B, H', W', width]."""
        x = Unit(self.cfg, x.shape[-1], 3, self.stride, depthwise=True, name="depthwise")(x)
        return Unit(self.cfg, self.width, 1, name="pointwise")(x)


def wide(cfg: Config, width: int, *, stride: int = 1, name: str) -> Unit | Separable:
    """Make a 3×3 convolution of the form that the config asks for."""
    if cfg.depthwise:
        return Separable(cfg, width, stride, name=name)
    return Unit(cfg, width, 3, stride, name=name)


def _focus(x: jax.Array) -> jax.Array:
    """Turn 2×2 pixels into channels: [B, H, W, F] -> [B, H/2, W/2, 4F], in the order (column, row, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def _doubled(x: jax.Array) -> jax.Array:
    """Repeat every place twice along both axes: [B, H, W, F] -> [B, 2H, 2W, F]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
