"""Residual networks (He et al. 2016), and the plain ones that they were held against.

Every block adds its layers' output to its input. Where a stage halves the image, the stride stands in the 3×3 layer of
a bottleneck ("v1.5"), which is about half a point better than in the first 1×1 as in the paper (README of NVIDIA's
ResNet50 v1.5). A block's last scale starts at 0, so that at the start every block is its shortcut (Goyal et al. 2017,
section 5.1).

The CIFAR form (section 4.2) has 6n + 2 layers in three stages of 16, 32 and 64 channels, a 3×3 stem, and shortcuts
without parameters: the image is thinned and the new channels are 0. All its scales start at 1: with the last ones at 0,
20 layers on drawn scenes were still at chance after 300 of 640 steps, and ended at a loss of 1.15 instead of 0.09.

Blocks are a Python loop, not a stacked scan: XLA's convolutions are slower inside one on a CPU (gradient step of a
ResNet-50 on [8, 64, 64, 3], two busy cores: 4.4 s against 11.7, and 7.6 CPU-seconds to compile against 13.0; a
ResNet-152 7.0 against 32.6, and 28 to compile against 13).

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
from fm_jax.layers.tap import Tap, stages, visit


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    depths: tuple[int, ...]  # blocks a stage
    widths: tuple[int, ...]  # channels out of each stage
    block: Literal["basic", "bottleneck"]  # two 3×3; or 1×1, 3×3 at a quarter of the channels, 1×1
    stem_width: int = 64
    stem: Literal["pooled", "small"] = "pooled"  # 7×7 stride 2 and a max pool stride 2; or 3×3, for small images
    shortcut: Literal["project", "pad", "none"] = "project"  # where shapes change; "none" nowhere: a plain network
    stride_first: bool = False  # the stride of a bottleneck in its first layer: the paper's form ("v1")
    in_channels: int = 3
    zero_init: bool = training(True)  # whether a block's last scale starts at 0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9  # share of the running moments that stays at each step
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # of the computation, not of parameters

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if not self.depths or len(self.depths) != len(self.widths):
            raise ConfigError(f"depths {self.depths} and widths {self.widths} must name the same stages, at least one")
        for name in ("depths", "widths"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("stem_width", "in_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise ConfigError(f"widths of bottlenecks must be multiples of 4, not {self.widths}")
        if self.shortcut == "pad" and list(self.widths) != sorted((self.stem_width, *self.widths))[1:]:
            raise ConfigError(f"shortcut 'pad' adds channels: widths {self.widths} must not fall below the one before")
        if self.norm_epsilon <= 0 or not 0 <= self.norm_momentum < 1:
            raise ConfigError(
                f"norm_epsilon must be above 0 and norm_momentum in [0, 1), not {self.norm_epsilon}, "
                f"{self.norm_momentum}"
            )


def resnet(depths: tuple[int, ...], block: Literal["basic", "bottleneck"], multiplier: float = 1.0) -> Config:
    """Return a network for ImageNet (table 1), with every width times `multiplier`."""
    first = round(64 * multiplier)
    wide = 4 if block == "bottleneck" else 1
    return Config(depths, tuple(wide * first * 2**stage for stage in range(len(depths))), block, stem_width=first)


def cifar(layers: int, width: int = 16, shortcut: Literal["project", "pad", "none"] = "pad") -> Config:
    """Return a network of the CIFAR form: 6n + 2 layers, `width` channels in the first of three stages.

    Raises:
        ConfigError: another number of layers.
    """
    blocks, rest = divmod(layers - 2, 6)
    if rest or blocks < 1:
        raise ConfigError(f"the CIFAR form has 6n + 2 layers (8, 14, 20, 32, …), not {layers}")
    widths = (width, 2 * width, 4 * width)
    return Config((blocks,) * 3, widths, "basic", stem_width=width, stem="small", shortcut=shortcut, zero_init=False)


def tiny() -> Config:
    """Return a model for tests: two stages of one basic block, 8 and 16 channels."""
    return Config((1, 1), (8, 16), "basic", stem_width=8, stem="small")


# He et al. 2016, table 1; (parameters with a head of 1000 classes)
resnet18 = partial(resnet, (2, 2, 2, 2), "basic")  # 11.7 M
resnet34 = partial(resnet, (3, 4, 6, 3), "basic")  # 21.8 M
resnet50 = partial(resnet, (3, 4, 6, 3), "bottleneck")  # 25.6 M
resnet101 = partial(resnet, (3, 4, 23, 3), "bottleneck")  # 44.5 M
resnet152 = partial(resnet, (3, 8, 36, 3), "bottleneck")  # 60.2 M

# He et al. 2016, table 6; (parameters with a head of 10 classes)
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
        """Name what a tap can reach: the stem's output, each stage's, and the last feature map."""
        return stages(len(self.cfg.depths))

    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the features, as `features` does."""
        return self.features(image, tap=tap)

    def features(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the mean over the last feature map's places: [B, C] in float32."""
        return self.hidden(image, tap=tap).astype(jnp.float32).mean(axis=(1, 2))

    @nn.compact
    def hidden(self, image: jax.Array, *, tap: Tap | None = None) -> jax.Array:
        """Return the last feature map [B, H', W', C].

        Args:
            image: [B, H, W, in_channels], normalised; of any size.
            tap: what to read or edit at named sites.

        Raises:
            ConfigError: another number of channels.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        check_images(image, cfg.in_channels)
        size, stride = (7, 2) if cfg.stem == "pooled" else (3, 1)
        x = conv(cfg.stem_width, size, (None, "embed"), stride=stride, dtype=dtype, name="stem")(image.astype(dtype))
        x = jax.nn.relu(_norm(cfg, "norm_stem")(x))
        if cfg.stem == "pooled":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # padded with -inf
        x = constrain(visit(self, tap, "embed", x), "batch", None, None, "width")
        for stage, (depth, width) in enumerate(zip(cfg.depths, cfg.widths, strict=True), 1):
            x = Stage(cfg, depth, width, 1 if stage == 1 else 2, name=f"stage{stage}")(x)
            x = visit(self, tap, f"conv.stage{stage}", x)
        return visit(self, tap, "final", x)


class Stage(nn.Module):
    """Blocks of one width, of which the first may halve the image: [B, H, W, C] -> [B, H', W', width]."""

    cfg: Config
    depth: int
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the last block's output."""
        for block in range(self.depth):
            x = Block(self.cfg, self.width, self.stride if block == 0 else 1, name=f"block{block}")(x)
        return x


class Block(nn.Module):
    """Two or three convolutions, each normalised, added to their input: [B, H, W, C] -> [B, H', W', width]."""

    cfg: Config
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the rectified sum."""
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
        """Return (channels out, size, stride, logical axes) of each convolution."""
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
        """Return the block's input in the shape of its output."""
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
    return BatchNorm(cfg.norm_epsilon, cfg.norm_momentum, start, jnp.dtype(cfg.dtype), name=name)
