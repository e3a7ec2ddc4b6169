"""EfficientNet (Tan & Le 2019): inverted bottlenecks, with depth, width and image size scaled together.

A block (MBConv, Sandler et al. 2018) has a 1×1 expansion by 6, a depthwise convolution, squeeze-and-excitation (its
bottleneck is a quarter of the block's *input*), and a 1×1 projection without activation. Blocks with equal input and
output shapes have a residual connection with drop path, whose rate grows with depth. Padding is "SAME" as in
TensorFlow: uneven for stride 2 on even sizes.

Dims: B batch, H height, W width, C channels.
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
from fm_jax.layers.drop_path import DropPath
from fm_jax.layers.squeeze_excite import SqueezeExcite
from fm_jax.layers.tap import Tap, stages, visit


@dataclass(frozen=True)
class Stage:
    """Blocks of one width, before scaling."""

    repeats: int  # number of blocks
    size: int  # kernel size
    stride: int  # stride of the first block
    expand: int  # expansion factor of the input's channels; 1: no expansion layer
    width: int  # output channels


# Tan & Le 2019, table 1
BASELINE = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    width: float = 1.0  # factor of the baseline's channels
    depth: float = 1.0  # factor of the baseline's repeats
    image_size: int = 224  # size of the training images; other sizes work too
    stages: tuple[Stage, ...] = BASELINE
    stem_width: int = 32
    head_width: int = 1280
    divisor: int = 8  # numbers of channels are multiples of this
    squeeze: float = 0.25  # width of the squeeze-and-excitation bottleneck, as a share of the block's input
    drop_path: float = training(0.2)  # drop path rate; block i of n has i / n of it
    in_channels: int = 3
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.99  # share of the old running moments at each step
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("image_size", "stem_width", "head_width", "divisor", "in_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("width", "depth", "squeeze", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("drop_path", "norm_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not self.stages:
            raise ConfigError("stages is empty; give at least one stage")
        for stage in self.stages:
            if min(stage.repeats, stage.size, stage.stride, stage.expand, stage.width) < 1 or stage.size % 2 == 0:
                raise ConfigError(f"every number of a stage must be at least 1 and its size odd, not {stage}")

    def channels(self, width: int) -> int:
        """Scale a baseline width and round it to a multiple of `divisor`, never below 90 % of the scaled width."""
        scaled = width * self.width
        rounded = max(self.divisor, int(scaled + self.divisor / 2) // self.divisor * self.divisor)
        return rounded + self.divisor if rounded < 0.9 * scaled else rounded

    def repeats(self, stage: Stage) -> int:
        """Return the number of a stage's blocks after scaling."""
        return math.ceil(self.depth * stage.repeats)

    def odd_blocks(self) -> tuple[int, ...]:
        """Return the indices of the blocks that halve a feature map of odd height, at `image_size`."""
        indices, number, side = list[int](), 0, -(-self.image_size // 2)
        for stage in self.stages:
            if stage.stride > 1 and side % 2:
                indices.append(number)
            side = -(-side // stage.stride)
            number += self.repeats(stage)
        return tuple(indices)


class Scale(NamedTuple):
    """A published model: width and depth factors, image size, and dropout before the classifier."""

    width: float
    depth: float
    image_size: int
    dropout: float


# B0 … B7 of tensorflow/tpu, efficientnet_builder.py (numbers of parameters with a head of 1000 classes)
SCALES = (
    Scale(1.0, 1.0, 224, 0.2),  # 5.3 M
    Scale(1.0, 1.1, 240, 0.2),  # 7.8 M
    Scale(1.1, 1.2, 260, 0.3),  # 9.1 M
    Scale(1.2, 1.4, 300, 0.3),  # 12.2 M
    Scale(1.4, 1.8, 380, 0.4),  # 19.3 M
    Scale(1.6, 2.2, 456, 0.4),  # 30.4 M
    Scale(1.8, 2.6, 528, 0.5),  # 43.0 M
    Scale(2.0, 3.1, 600, 0.5),  # 66.3 M
)


def efficientnet(number: int) -> Config:
    """Return B0 … B7 (`SCALES[number].dropout` is for its classifier)."""
    if not 0 <= number < len(SCALES):
        raise ConfigError(f"the EfficientNet's number must be 0 to {len(SCALES) - 1}, not {number}")
    width, depth, image_size, _ = SCALES[number]
    return Config(width, depth, image_size)


def tiny() -> Config:
    """Return a model for tests: three blocks of 8 and 16 channels."""
    stages = (Stage(1, 3, 1, 1, 8), Stage(2, 3, 2, 4, 16))
    return Config(image_size=16, stages=stages, stem_width=8, head_width=32)


efficientnet_b0 = partial(efficientnet, 0)
efficientnet_b1 = partial(efficientnet, 1)
efficientnet_b2 = partial(efficientnet, 2)
efficientnet_b3 = partial(efficientnet, 3)
efficientnet_b4 = partial(efficientnet, 4)
efficientnet_b5 = partial(efficientnet, 5)
efficientnet_b6 = partial(efficientnet, 6)
efficientnet_b7 = partial(efficientnet, 7)


class EfficientNet(nn.Module):
    """Images [B, H, W, in_channels] -> features [B, C]."""

    cfg: Config

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the names of the sites: the stem's output, each stage's, and the last feature map."""
        return stages(len(self.cfg.stages))

    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the features [B, C] in float32 of images [B, H, W, in_channels]."""
        return self.features(image, tap=tap)

    def features(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the last feature map's mean over positions: [B, H, W, in_channels] -> [B, C] in float32."""
        return self.hidden(image, tap=tap).astype(jnp.float32).mean(axis=(1, 2))

    @nn.compact
    def hidden(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the last feature map [B, H', W', C].

        Args:
            image: normalised images [B, H, W, in_channels] of any size.
            tap: sites to read or edit.

        Raises:
            ConfigError: the images have another number of channels.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        check_images(image, cfg.in_channels)
        stem: dict[str, Any] = {"stride": 2, "padding": "SAME", "dtype": dtype, "name": "stem"}
        x = conv(cfg.channels(cfg.stem_width), 3, (None, "embed"), **stem)(image.astype(dtype))
        x = visit(self, tap, "embed", jax.nn.silu(_norm(cfg, "norm_stem")(x)))
        x = constrain(x, "batch", None, None, "width")
        total, number = sum(map(cfg.repeats, cfg.stages)), 0
        for index, stage in enumerate(cfg.stages, 1):
            for block in range(cfg.repeats(stage)):
                rate = cfg.drop_path * number / total
                x = Block(cfg, stage, block == 0, rate, name=f"stage{index}_block{block}")(x)
                number += 1
            x = visit(self, tap, f"conv.stage{index}", x)
        x = conv(cfg.channels(cfg.head_width), 1, ("embed", "mlp"), dtype=dtype, name="top")(x)
        return visit(self, tap, "final", jax.nn.silu(_norm(cfg, "norm_top")(x)))


class Block(nn.Module):
    """MBConv: expansion, depthwise convolution, squeeze-and-excitation, projection: [B, H, W, C] -> [B, H', W', C']."""

    cfg: Config
    stage: Stage
    first: bool  # first of its stage: has the stride and no residual connection, because it changes the shape
    drop: float  # drop path rate

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block: [B, H, W, C] -> [B, H', W', C']."""
        cfg, stage, dtype = self.cfg, self.stage, jnp.dtype(self.cfg.dtype)
        width, out = x.shape[-1], x
        if stage.expand > 1:
            out = conv(width * stage.expand, 1, ("embed", "mlp"), dtype=dtype, name="expand")(out)
            out = jax.nn.silu(_norm(cfg, "norm_expand")(out))
        stride = stage.stride if self.first else 1
        out = Depthwise(stage.size, stride, "SAME", dtype=dtype, name="filter")(out)
        out = jax.nn.silu(_norm(cfg, "norm_filter")(out))
        out = SqueezeExcite(max(1, int(width * cfg.squeeze)), dtype, name="squeeze")(out)
        out = conv(cfg.channels(stage.width), 1, ("mlp", "embed"), dtype=dtype, name="narrow")(out)
        out = _norm(cfg, "norm_narrow")(out)
        out = out if self.first else x + DropPath(self.drop)(out)
        return constrain(out, "batch", None, None, "width")


def _norm(cfg: Config, name: str) -> BatchNorm:
    return BatchNorm(cfg.norm_epsilon, cfg.norm_momentum, dtype=jnp.dtype(cfg.dtype), name=name)
