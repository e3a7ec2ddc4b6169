"""Residual networks (He et al. 2016), and plain networks without shortcuts for comparison.

Every block adds its layers' output to its input. A bottleneck that halves the image has the stride in its 3×3 layer
("v1.5"), which is about half a point better than in the first 1×1, as in the paper (README of NVIDIA's ResNet50 v1.5).
The scale of a block's last norm starts at 0, so every block starts as its shortcut (Goyal et al. 2017, section 5.1).

The CIFAR form (section 4.2) has 6n + 2 layers in three stages of 16, 32 and 64 channels, a 3×3 stem, and shortcuts
without parameters: the image is subsampled and new channels are 0. All its scales start at 1: with the last ones at 0,
20 layers on synthetic scenes were still at chance after 300 of 640 steps, and ended at a loss of 1.15 instead of 0.09.

Blocks are a Python loop, not a stacked scan, because XLA's convolutions are slower inside a scan on a CPU (gradient
step of a ResNet-50 on [8, 64, 64, 3], two busy cores: 4.4 s against 11.7, and 7.6 CPU-seconds to compile against 13.0;
a ResNet-152 7.0 against 32.6, and 28 to compile against 13).

Dims: B batch, H height, W width, C channels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import precision, training
from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.layers.batch_norm import BatchNorm
from fm_jax.layers.conv import check_images, conv
from fm_jax.layers.stack import rematerialised
from fm_jax.layers.tap import Tap, stages, visit
from fm_jax.ops.pooling import max_pool


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    depths: tuple[int, ...]  # number of blocks of each stage
    widths: tuple[int, ...]  # output channels of each stage
    block: Literal["basic", "bottleneck"]  # two 3×3 layers; or 1×1, 3×3 with a quarter of the channels, 1×1
    stem_width: int = 64
    stem: Literal["pooled", "small"] = "pooled"  # 7×7 with stride 2 and max pooling; or 3×3, for small images
    shortcut: Literal["project", "pad", "none"] = "project"  # how shapes are adapted; none: a network without shortcuts
    first_stride: Literal[1, 2] = 1  # stride of the first stage; the later ones have 2
    stride_first: bool = False  # put a bottleneck's stride in its first layer, as in the paper ("v1")
    in_channels: int = 3
    zero_init: bool = training(True)  # initialise the scale of each block's last norm with 0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9  # share of the old running moments at each step
    norm_frozen: bool = training(False)  # train with the running moments, and leave them, scales and biases unchanged
    remat: Literal["none", "full"] = training("none")  # full: compute each block again in the backward pass
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if not self.depths or len(self.depths) != len(self.widths):
            raise ConfigError(
                f"depths {self.depths} and widths {self.widths} must have one entry per stage, at least one each"
            )
        for name in ("depths", "widths"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("stem_width", "in_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise ConfigError(f"widths of bottlenecks must be multiples of 4, not {self.widths}")
        if self.shortcut == "pad" and list(self.widths) != sorted((self.stem_width, *self.widths))[1:]:
            raise ConfigError(
                f"shortcut 'pad' only adds channels, so stem_width {self.stem_width} and widths {self.widths} "
                "must not decrease"
            )
        if self.norm_epsilon < 0 or not 0 <= self.norm_momentum < 1:
            raise ConfigError(
                f"norm_epsilon must be at least 0 and norm_momentum in [0, 1), not {self.norm_epsilon}, "
                f"{self.norm_momentum}"
            )


def resnet(depths: tuple[int, ...], block: Literal["basic", "bottleneck"], multiplier: float = 1.0) -> Config:
    """Return a network for ImageNet (table 1), with every width multiplied by `multiplier`."""
    first = round(64 * multiplier)
    wide = 4 if block == "bottleneck" else 1
    return Config(depths, tuple(wide * first * 2**stage for stage in range(len(depths))), block, stem_width=first)


def cifar(layers: int, width: int = 16, shortcut: Literal["project", "pad", "none"] = "pad") -> Config:
    """Return a network of the CIFAR form: 6n + 2 layers, `width` channels in the first of three stages.

    Raises:
        ConfigError: the number of layers is not 6n + 2.
    """
    blocks, rest = divmod(layers - 2, 6)
    if rest or blocks < 1:
        raise ConfigError(f"the CIFAR form has 6n + 2 layers (8, 14, 20, 32, …), not {layers}")
    widths = (width, 2 * width, 4 * width)
    return Config((blocks,) * 3, widths, "basic", stem_width=width, stem="small", shortcut=shortcut, zero_init=False)


def tiny() -> Config:
    """Return a model for tests: two stages of one basic block, 8 and 16 channels."""
    return Config((1, 1), (8, 16), "basic", stem_width=8, stem="small")


# He et al. 2016, table 1 (numbers of parameters with a head of 1000 classes)
resnet18 = partial(resnet, (2, 2, 2, 2), "basic")  # 11.7 M
resnet34 = partial(resnet, (3, 4, 6, 3), "basic")  # 21.8 M
resnet50 = partial(resnet, (3, 4, 6, 3), "bottleneck")  # 25.6 M
resnet101 = partial(resnet, (3, 4, 23, 3), "bottleneck")  # 44.5 M
resnet152 = partial(resnet, (3, 8, 36, 3), "bottleneck")  # 60.2 M

# He et al. 2016, table 6 (numbers of parameters with a head of 10 classes)
resnet20 = partial(cifar, 20)  # 0.27 M
resnet32 = partial(cifar, 32)  # 0.46 M
resnet44 = partial(cifar, 44)  # 0.66 M
resnet56 = partial(cifar, 56)  # 0.85 M
resnet110 = partial(cifar, 110)  # 1.7 M
plain = partial(cifar, shortcut="none")  # the same layers without shortcuts


class ResNet(nn.Module):
    """Images [B, H, W, in_channels] -> features [B, C]."""

    cfg: Config

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the names of the sites: the stem's output, each stage's, and the last feature map."""
        return stages(len(self.cfg.depths))

    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the features [B, C] in float32 of images [B, H, W, in_channels]."""
        return self.features(image, tap=tap)

    def features(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the last feature map's mean over positions: [B, H, W, in_channels] -> [B, C] in float32."""
        return self.hidden(image, tap=tap).astype(jnp.float32).mean(axis=(1, 2))

    def hidden(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the last feature map [B, H', W', C]; arguments and errors are those of `maps`."""
        return visit(self, tap, "final", self.maps(image, tap=tap)[-1])

    @nn.compact
    def maps(self, image: jax.Array, *, tap: Tap | None = None) -> tuple[jax.Array, ...]:
        """Return the feature map [B, H', W', C] of every stage, fine to coarse.

        Args:
            image: normalised images [B, H, W, in_channels] of any size.
            tap: sites to read or edit.

        Raises:
            ConfigError: the images have another number of channels.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        check_images(image, cfg.in_channels)
        size, stride = (7, 2) if cfg.stem == "pooled" else (3, 1)
        x = conv(cfg.stem_width, size, (None, "embed"), stride=stride, dtype=dtype, name="stem")(image.astype(dtype))
        x = jax.nn.relu(_norm(cfg, "norm_stem")(x))
        if cfg.stem == "pooled":
            x = max_pool(x, 3, stride=2, padding=1)
        x = constrain(visit(self, tap, "embed", x), "batch", None, None, "width")
        maps = list[jax.Array]()
        for stage, (depth, width) in enumerate(zip(cfg.depths, cfg.widths, strict=True), 1):
            x = Stage(cfg, depth, width, cfg.first_stride if stage == 1 else 2, name=f"stage{stage}")(x)
            x = visit(self, tap, f"conv.stage{stage}", x)
            maps.append(x)
        return tuple(maps)


class Stage(nn.Module):
    """Blocks of one width; the first may halve the image: [B, H, W, C] -> [B, H', W', width]."""

    cfg: Config
    depth: int
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the blocks: [B, H, W, C] -> [B, H', W', width]."""
        make = rematerialised(Block, self.cfg.remat)
        for block in range(self.depth):
            x = make(self.cfg, self.width, self.stride if block == 0 else 1, name=f"block{block}")(x)
        return x


class Block(nn.Module):
    """Two or three normalised convolutions and a shortcut: [B, H, W, C] -> [B, H', W', width]."""

    cfg: Config
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block: [B, H, W, C] -> [B, H', W', width]."""
        cfg, out = self.cfg, x
        layers = self._layers()
        for number, (width, size, stride, axes) in enumerate(layers, 1):
            last = number == len(layers)
            options: dict[str, Any] = {"stride": stride, "dtype": jnp.dtype(cfg.dtype), "name": f"conv{number}"}
            zero = last and cfg.zero_init and cfg.shortcut != "none"
            out = _norm(cfg, f"norm{number}", zero)(conv(width, size, axes, **options)(out))
            if not last:
                out = jax.nn.relu(out)
        out = out if cfg.shortcut == "none" else out + self._shortcut(x)
        return constrain(jax.nn.relu(out), "batch", None, None, "width")

    def _layers(self) -> list[tuple[int, int, int, tuple[str, str]]]:
        """Return (output channels, kernel size, stride, logical axes) of each convolution."""
        stride, width = self.stride, self.width
        if self.cfg.block == "basic":
            return [(width, 3, stride, ("embed", "mlp")), (width, 3, 1, ("mlp", "embed"))]
        first, second = (stride, 1) if self.cfg.stride_first else (1, stride)
        narrow = width // 4
        return [
            (narrow, 1, first, ("embed", "mlp")),
            (narrow, 3, second, ("mlp", "embed")),
            (width, 1, 1, ("mlp", "embed")),
        ]

    def _shortcut(self, x: jax.Array) -> jax.Array:
        """Return the block's input [B, H, W, C] in the shape of its output [B, H', W', width]."""
        cfg = self.cfg
        if self.stride == 1 and x.shape[-1] == self.width:
            return x
        if cfg.shortcut == "pad":
            thin = x[:, :: self.stride, :: self.stride]
            return jnp.pad(thin, ((0, 0), (0, 0), (0, 0), (0, self.width - x.shape[-1])))
        options: dict[str, Any] = {"stride": self.stride, "dtype": jnp.dtype(cfg.dtype), "name": "shortcut"}
        return _norm(cfg, "norm_shortcut")(conv(self.width, 1, ("embed", "mlp"), **options)(x))


def _norm(cfg: Config, name: str, zero: bool = False) -> BatchNorm:
    start = nn.initializers.zeros_init() if zero else nn.initializers.ones_init()
    dtype = jnp.dtype(cfg.dtype)
    return BatchNorm(cfg.norm_epsilon, cfg.norm_momentum, start, dtype, cfg.norm_frozen, name=name)
