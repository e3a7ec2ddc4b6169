"""YOLOv3 and YOLOv3-tiny (Redmon & Farhadi 2018), in the form of Darknet's own files.

One network of 3×3 and 1×1 layers predicts, for every anchor of every cell of two or three scales, a box, whether there
is an object, and its classes. Every layer but the last of a scale is a convolution, a batch normalisation and a leaky
ReLU of slope 0.1. Darknet adds its epsilon to the standard deviation, not to the variance.

The residual form (Darknet-53) halves the image by the stride of each stage's first layer; blocks of a 1×1 and a 3×3
layer are added to their input. The pooled form ("tiny") has one 3×3 layer a stage after max pooling; the pooling of its
last stage keeps the size. A scale's neck alternates 1×1 and 3×3 layers. The next, finer scale gets its output through a
1×1 layer, doubled in size and joined to the backbone's map of that size.

Images are RGB in [0, 1], neither shifted nor scaled. Sides are multiples of the coarsest stride, 32.

Dims: B batch, H height, W width, C channels, N candidates (`ops/anchor_grid.py`), K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
from fm_jax.ops import anchor_grid
from fm_jax.ops.boxes import Detections, nms

SLOPE = 0.1  # of the leaky ReLU
NECK = 5  # layers of a scale's neck in the residual form

# Redmon & Farhadi 2018, section 2.3, from COCO: nine in the order of their size; coarsest scale first here
COCO = (
    ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
    ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
)
COCO_TINY = (
    ((81.0, 82.0), (135.0, 169.0), (344.0, 319.0)),
    ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0)),
)


@dataclass(frozen=True)
class Config:
    """Sizes and form of the model."""

    widths: tuple[int, ...]  # output channels of the stem and of each stage
    depths: tuple[int, ...]  # residual blocks of each stage; empty: the pooled form
    head_widths: tuple[int, ...]  # channels that each scale predicts from, coarsest scale first; its neck has half
    anchors: tuple[tuple[tuple[float, float], ...], ...]  # (width, height) in pixels, for each scale
    num_classes: int = 80
    pools: tuple[int, ...] = ()  # sizes of max pooling joined in the first neck (spatial pyramid pooling, "spp")
    image_size: tuple[int, int] = (416, 416)  # (height, width) the anchors are meant for; others work too
    in_channels: int = 3
    norm_epsilon: float = 1e-6  # added to the standard deviation
    norm_momentum: float = 0.99  # share of the old running moments at each step
    remat: Literal["none", "full"] = training("none")  # whether the backward pass computes the blocks and necks again
    dtype: Literal["float32", "bfloat16", "float16"] = precision("float32")  # compute dtype; parameters are float32

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("widths", "head_widths", "anchors"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty")
        for name in ("widths", "head_widths", "depths", "pools", "image_size"):
            if min(getattr(self, name), default=1) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("num_classes", "in_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.depths and len(self.depths) != len(self.widths) - 1:
            raise ConfigError(
                f"depths {self.depths} must have one entry for each of widths {self.widths} but the first"
            )
        if not 1 <= len(self.head_widths) <= self.halvings:
            raise ConfigError(f"head_widths {self.head_widths}: {self.halvings} halvings give at most as many scales")
        if len(self.anchors) != len(self.head_widths) or not all(self.anchors):
            raise ConfigError(f"anchors {self.anchors} must have an entry of at least one pair for each of head_widths")
        if any(min(pair) <= 0 for pairs in self.anchors for pair in pairs):
            raise ConfigError(f"sides of anchors must be above 0, not {self.anchors}")
        halved = (*self.head_widths, *(self.widths[1:] if self.depths else ()))
        if any(width % 2 for width in halved) or any(size % 2 == 0 for size in self.pools):
            raise ConfigError(
                f"head_widths {self.head_widths} and widths {self.widths} of blocks are halved and must be even, "
                f"pools {self.pools} keep the size and must be odd"
            )
        if self.pools and not self.depths:
            raise ConfigError("pools belong to the residual form, whose depths are not empty")
        if self.norm_epsilon <= 0 or not 0 <= self.norm_momentum < 1:
            raise ConfigError(
                f"norm_epsilon must be above 0 and norm_momentum in [0, 1), not {self.norm_epsilon}, "
                f"{self.norm_momentum}"
            )
        anchor_grid.check_size(self.image_size, self.strides)

    @property
    def halvings(self) -> int:
        """Return how often the image is halved; the last stage of the pooled form keeps its size."""
        return len(self.widths) - 1 if self.depths else len(self.widths) - 2

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the side in pixels of each scale's cells, coarsest first."""
        return tuple(2 ** (self.halvings - scale) for scale in range(len(self.head_widths)))


class Outputs(NamedTuple):
    """Predictions for all candidates of the images, in the numbering of `ops/anchor_grid.py`; float32."""

    boxes: jax.Array  # [B, N, 4] tx, ty, tw, th
    objectness: jax.Array  # [B, N] logits
    classes: jax.Array  # [B, N, K] logits


def yolov3(num_classes: int = 80) -> Config:
    """Return YOLOv3 on Darknet-53 (61.9 M parameters at 80 classes)."""
    return Config((32, 64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), (1024, 512, 256), COCO, num_classes)


def yolov3_spp(num_classes: int = 80) -> Config:
    """Return YOLOv3 with spatial pyramid pooling, for images of 608 pixels (63.0 M parameters at 80 classes)."""
    widths, depths = (32, 64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)
    return Config(widths, depths, (1024, 512, 256), COCO, num_classes, pools=(5, 9, 13), image_size=(608, 608))


def yolov3_tiny(num_classes: int = 80) -> Config:
    """Return YOLOv3-tiny (8.9 M parameters at 80 classes)."""
    return Config((16, 32, 64, 128, 256, 512, 1024), (), (512, 256), COCO_TINY, num_classes)


def tiny() -> Config:
    """Return a model for tests: two stages of one block, two scales of two anchors, four classes."""
    anchors = (((6.0, 5.0), (8.0, 12.0)), ((2.0, 3.0), (4.0, 3.0)))
    return Config((8, 8, 16), (1, 1), (16, 8), anchors, num_classes=4, image_size=(8, 8))


class YOLOv3(nn.Module):
    """Images [B, H, W, in_channels] -> predictions for N candidates."""

    cfg: Config

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the names of the sites: the stem's output, each stage's, and what each scale predicts from."""
        *backbone, _ = stages(len(self.cfg.widths) - 1)
        return (*backbone, *(f"final.scale{scale}" for scale in range(1, len(self.cfg.head_widths) + 1)))

    @nn.compact
    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> Outputs:
        """Return the predictions for images [B, H, W, in_channels].

        Args:
            image: RGB images in [0, 1]; both sides are multiples of the coarsest stride.
            tap: sites to read or edit.

        Raises:
            ConfigError: the images have another number of channels, or a size that cells do not tile.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        check_images(image, cfg.in_channels)
        anchor_grid.check_size((image.shape[1], image.shape[2]), cfg.strides)
        x = Layer(cfg, cfg.widths[0], 3, (None, "embed"), name="stem")(image.astype(dtype))
        x = constrain(visit(self, tap, "embed", x), "batch", None, None, "width")
        maps = [x]
        for stage in range(1, len(cfg.widths)):
            x = visit(self, tap, f"conv.stage{stage}", Stage(cfg, stage, name=f"stage{stage}")(x))
            maps.append(x)
        found = []
        for scale, (width, pairs) in enumerate(zip(cfg.head_widths, cfg.anchors, strict=True), 1):
            if scale > 1:
                x = Layer(cfg, width // 2, 1, ("embed", "mlp"), name=f"lateral{scale}")(x)
                x = jnp.concatenate([_doubled(x), maps[cfg.halvings + 1 - scale]], axis=-1)
            x = rematerialised(Neck, cfg.remat)(cfg, scale, name=f"neck{scale}")(x)
            features = Layer(cfg, width, 3, ("embed", "mlp"), name=f"head{scale}")(x)
            features = visit(self, tap, f"final.scale{scale}", features)
            options: dict[str, Any] = {"bias": True, "init": _INIT, "dtype": dtype, "name": f"predict{scale}"}
            raw = conv(len(pairs) * (5 + cfg.num_classes), 1, ("mlp", "classes"), **options)(features)
            found.append(raw.astype(jnp.float32).reshape(len(raw), -1, 5 + cfg.num_classes))
        joined = jnp.concatenate(found, axis=1)
        return Outputs(joined[..., :4], joined[..., 4], joined[..., 5:])


class Stage(nn.Module):
    """A stage of the backbone: [B, H, W, C] -> [B, H', W', width]."""

    cfg: Config
    number: int  # from 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the stage: [B, H, W, C] -> [B, H', W', width]."""
        cfg, width = self.cfg, self.cfg.widths[self.number]
        if not cfg.depths:
            # Darknet pads at the right and at the bottom, with -inf
            stride, after = (2, (0, 0)) if self.number <= cfg.halvings else (1, (0, 1))
            x = nn.max_pool(x, (2, 2), (stride, stride), (after, after))
            return rematerialised(Layer, cfg.remat)(cfg, width, 3, ("embed", "mlp"), name="conv")(x)
        x = Layer(cfg, width, 3, ("embed", "mlp"), stride=2, name="down")(x)
        for block in range(cfg.depths[self.number - 1]):
            x = rematerialised(Block, cfg.remat)(cfg, width, name=f"block{block}")(x)
        return x


class Block(nn.Module):
    """A 1×1 and a 3×3 layer, added to their input: [B, H, W, width] -> the same shape."""

    cfg: Config
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block: [B, H, W, width] -> [B, H, W, width]."""
        inner = Layer(self.cfg, self.width // 2, 1, ("embed", "mlp"), name="conv1")(x)
        return x + Layer(self.cfg, self.width, 3, ("mlp", "embed"), name="conv2")(inner)


class Neck(nn.Module):
    """The layers between a scale's map and its head: [B, H, W, C] -> [B, H, W, width], none in tiny's later scales."""

    cfg: Config
    scale: int  # from 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the neck: [B, H, W, C] -> [B, H, W, width]."""
        cfg, width = self.cfg, self.cfg.head_widths[self.scale - 1]
        for number, (size, out, pooled) in enumerate(neck_layers(cfg, self.scale), 1):
            if pooled:
                x = jnp.concatenate([*(_pooled(x, side) for side in reversed(cfg.pools)), x], axis=-1)
            axes = ("embed", "mlp") if out != width else ("mlp", "embed")
            x = Layer(cfg, out, size, axes, name=f"conv{number}")(x)
        return x


def neck_layers(cfg: Config, scale: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (kernel size, output channels, whether pooled maps are joined before it) for each layer of a neck.

    Args:
        cfg: the model's config.
        scale: number of the scale, from 1, the coarsest.
    """
    wide = cfg.head_widths[scale - 1]
    if not cfg.depths:
        if scale == 1:
            yield 1, wide // 2, False
        return
    for number in range(NECK):
        if number == 3 and scale == 1 and cfg.pools:
            yield 1, wide // 2, True
        yield (3, wide, False) if number % 2 else (1, wide // 2, False)


class Layer(nn.Module):
    """A convolution without bias, a batch normalisation and a leaky ReLU: [B, H, W, C] -> [B, H', W', features]."""

    cfg: Config
    features: int
    size: int
    axes: tuple[str | None, str | None]
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layer: [B, H, W, C] -> [B, H', W', features]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        options: dict[str, Any] = {"stride": self.stride, "init": _INIT, "dtype": dtype, "name": "conv"}
        x = conv(self.features, self.size, self.axes, **options)(x)
        x = BatchNorm(cfg.norm_epsilon, cfg.norm_momentum, dtype=dtype, added_to="deviation", name="norm")(x)
        return constrain(jax.nn.leaky_relu(x, SLOPE), "batch", None, None, "width")


_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # Darknet's


def _doubled(x: jax.Array) -> jax.Array:
    """Repeat every row and column: [B, H, W, C] -> [B, 2H, 2W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _pooled(x: jax.Array, size: int) -> jax.Array:
    """Return the maximum of size × size neighbours, in the same shape."""
    return nn.max_pool(x, (size, size), (1, 1), "SAME")


def decode(cfg: Config, outputs: Outputs, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Return boxes [B, N, 4] in pixels and scores [B, N, K] of predictions for images of `size` (height, width).

    A score is the probability of an object times that of the class, which are independent of the other classes'.
    """
    boxes = anchor_grid.decode(outputs.boxes, anchor_grid.grid(size, cfg.strides, cfg.anchors))
    return boxes, jax.nn.sigmoid(outputs.objectness)[..., None] * jax.nn.sigmoid(outputs.classes)


def detect(
    cfg: Config,
    outputs: Outputs,
    size: tuple[int, int],
    *,
    score: float = 0.005,
    overlap: float = 0.45,
    limit: int = 100,
    candidates: int = 1000,
) -> Detections:
    """Return the best boxes of each image, in pixels of the network's input.

    As in Darknet, every pair of a box and a class is a detection of its own, and only boxes of one class suppress each
    other. The defaults of `score` and `overlap` are those with which Darknet scores COCO.

    Args:
        cfg: the model's config.
        outputs: what the model returned.
        size: (height, width) of the images.
        score: what the score of a detection must exceed.
        overlap: IoU above which the better of two boxes suppresses the other.
        limit: detections of an image.
        candidates: best pairs of an image that are looked at.

    Returns:
        `limit` places an image, the best first; those without a detection are zeros and not valid.
    """
    boxes, scores = decode(cfg, outputs, size)

    def one(boxes: jax.Array, scores: jax.Array) -> Detections:
        best, place = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
        candidate, kind = place // cfg.num_classes, (place % cfg.num_classes).astype(jnp.int32)
        near = boxes[candidate]
        kept, valid = nms(near, jnp.where(best > score, best, -jnp.inf), overlap, limit, groups=kind)
        found = Detections(near[kept], best[kept], kind[kept], valid)
        masks = (valid.reshape(-1, *(1,) * (part.ndim - 1)) for part in found)
        # zeros of each part's own dtype: a Python 0 would turn the mask `valid` into integers
        return Detections(*(jnp.where(on, part, jnp.zeros_like(part)) for on, part in zip(masks, found, strict=True)))

    return jax.vmap(one)(boxes, scores)
