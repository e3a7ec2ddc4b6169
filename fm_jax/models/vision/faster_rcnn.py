"""Faster R-CNN (Ren et al. 2015) on a feature pyramid (Lin et al. 2017): propose boxes, then classify and refine each.

The first stage slides one small network over all maps of the pyramid. At every position it scores three anchors, fixed
boxes of different ratios, and moves and scales each to fit the object near it. The best ones, without near duplicates,
are the proposals. The second stage crops each proposal from the one map that fits its size, and classifies and refines
the crop. Class 0 of its scores is the background; a class of the data set is one less.

The model is that of torchvision's `fasterrcnn_resnet50_fpn`, which differs from the paper in the pyramid, in RoIAlign
instead of pooling, and in keeping anchors that leave the image. Every array has a fixed shape: proposals and detections
are padded, so all images of a size share one program.

Parameters are "backbone/…", "pyramid/…", "rpn/…" and "box/…": `checkpoint/surgery.load` copies the first from any model
with the same backbone, with the others listed as fresh. Detectors usually train with the backbone's batch norms frozen
(`norm_frozen`), and its stem and first stage frozen by pattern.

Recipe (detectron2's model zoo, R50-FPN 1×): SGD 0.9, lr 0.02 for 16 images, decay 1e-4, 90k steps, lr ÷ 10 at 60k and
80k, short side 640 to 800: 37.9 AP. torchvision's weights have 37.0.

Dims: B batch, H height, W width, A anchors of all levels, R anchors a position, K proposals, C classes with the
background, D channels of the pyramid, P size of a crop.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.layers.conv import conv
from fm_jax.layers.dense import Initializer, dense, normal
from fm_jax.layers.pyramid import Pyramid
from fm_jax.layers.tap import Tap, stages, visit
from fm_jax.models.vision import resnet
from fm_jax.ops import boxes as ops
from fm_jax.ops.anchors import anchors, propose
from fm_jax.ops.boxes import Detections
from fm_jax.ops.matmul import flat_dot_general
from fm_jax.ops.roi import pyramid_roi_align

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of a proposal's deltas (Girshick 2015: they then have about unit variance)
_THINNEST = 1e-2  # pixels of a detection's sides


@dataclass(frozen=True)
class Config:
    """Pyramid, anchors, proposals and heads; norms and dtype are the backbone's."""

    num_classes: int  # without the background
    width: int = 256  # channels of the pyramid
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)  # one a level: a level more than stages
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    decoded: tuple[int, int] = (2000, 1000)  # anchors of each level that are decoded, in training and in evaluation
    proposals: tuple[int, int] = (2000, 1000)  # proposals of an image, in training and in evaluation
    proposal_overlap: float = 0.7  # IoU above which the worse of two proposals of a level is dropped
    crop: int = 7  # bins of a crop along each axis
    sampling: int = 2  # points of a bin along each axis
    canonical: float = 224.0  # side in pixels of a box that is cropped from the level of stride 16
    head_width: int = 1024  # of the two hidden layers that read a crop
    score: float = 0.05  # least score of a detection
    overlap: float = 0.5  # IoU above which the worse of two detections of a class is dropped
    detections: int = 100  # largest number of detections of an image

    def __post_init__(self) -> None:
        """Check that values are in range."""
        check_least(self, num_classes=1, width=1, crop=1, sampling=1, head_width=1, detections=1)
        for name in ("anchor_sizes", "anchor_ratios"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ConfigError(f"{name} must be finite and above 0, at least one, not {values}")
        for name in ("decoded", "proposals"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("proposal_overlap", "overlap", "score"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not 0 < self.canonical < math.inf:
            raise ConfigError(f"canonical must be finite and above 0, not {self.canonical}")


def resnet50_fpn(num_classes: int = 90) -> tuple[Config, resnet.Config]:
    """Return detector and backbone of torchvision's `fasterrcnn_resnet50_fpn` (41.8 M parameters at 90 classes).

    The batch norms are frozen: their parameters are to come from a pretrained backbone.
    """
    depths, widths = (3, 4, 6, 3), (256, 512, 1024, 2048)
    return Config(num_classes), resnet.Config(depths, widths, "bottleneck", norm_frozen=True)


def scenes(num_classes: int = 3) -> tuple[Config, resnet.Config]:
    """Return detector and backbone for scenes of 64 to 96 pixels with objects of 8 to 40 (0.9 M parameters)."""
    cfg = Config(
        num_classes,
        width=64,
        anchor_sizes=(12.0, 20.0, 28.0, 40.0),
        decoded=(128, 128),
        proposals=(128, 64),
        canonical=48.0,
        head_width=128,
        detections=20,
    )
    return cfg, resnet.Config((1, 1, 1), (32, 64, 128), "basic", stem_width=32)


def tiny() -> tuple[Config, resnet.Config]:
    """Return a detector and a backbone for tests: two stages of 8 and 16 channels, three levels."""
    cfg = Config(
        2, 8, (8.0, 16.0, 32.0), (0.5, 2.0), (24, 16), (24, 8), crop=3, canonical=64.0, head_width=16, detections=6
    )
    return cfg, resnet.Config((1, 1), (8, 16), "basic", stem_width=8)


class Regions(NamedTuple):
    """What the first stage returns."""

    maps: tuple[jax.Array, ...]  # the pyramid, [B, H, W, D] each, fine to coarse
    anchors: jax.Array  # [A, 4] pixels
    objectness: jax.Array  # [B, A] float32 logits
    deltas: jax.Array  # [B, A, 4] float32, from the anchor to its object
    proposals: jax.Array  # [B, K, 4] pixels, best first
    valid: jax.Array  # [B, K] bool: places that hold a proposal


class Outputs(NamedTuple):
    """What both stages return in evaluation; `detect` makes detections of it."""

    objectness: jax.Array  # [B, A] float32 logits
    deltas: jax.Array  # [B, A, 4] float32
    proposals: jax.Array  # [B, K, 4] pixels, best first
    valid: jax.Array  # [B, K] bool
    logits: jax.Array  # [B, K, C] float32; 0 is the background
    refined: jax.Array  # [B, K, C, 4] float32: each class's deltas from the proposal


class FasterRCNN(nn.Module):
    """Images [B, H, W, 3] -> `Outputs`; the backbone is any module with `maps(image)`, fine to coarse."""

    cfg: Config
    backbone: nn.Module

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the names of the sites: the backbone's stem and stages, the pyramid's levels, what a crop becomes."""
        found = stages(len(self.backbone.cfg.depths))
        return (*found[:-1], *(f"pyramid.level{level + 1}" for level in range(len(found) - 1)), "final")

    def setup(self) -> None:
        """Declare the three parts; the backbone is passed in."""
        cfg, dtype = self.cfg, jnp.dtype(self.backbone.cfg.dtype)
        if len(cfg.anchor_sizes) != (count := len(self.backbone.cfg.depths)) + 1:
            raise ConfigError(
                f"anchor_sizes {cfg.anchor_sizes} must have {count + 1} entries, one more than the backbone's stages"
            )
        self.pyramid = Pyramid(cfg.width, dtype=dtype)
        self.rpn = Proposer(cfg.width, len(cfg.anchor_ratios), dtype)
        self.box = BoxHead(cfg.num_classes + 1, cfg.head_width, dtype)

    def __call__(self, image: jax.Array, *, tap: Tap | None = None) -> Outputs:
        """Return the outputs for normalised images [B, H, W, 3]; sides should be multiples of the coarsest stride.

        Raises:
            ConfigError: the images have another number of channels, or the anchors another number of levels.
        """
        found = self.regions(image, tap=tap)
        size = (image.shape[1], image.shape[2])
        logits, refined = self.classify(found.maps, found.proposals, size, tap=tap)
        return Outputs(found.objectness, found.deltas, found.proposals, found.valid, logits, refined)

    def regions(self, image: jax.Array, *, train: bool = False, tap: Tap | None = None) -> Regions:
        """Return the first stage's outputs; `train` chooses the numbers of proposals. See `__call__`."""
        cfg, size = self.cfg, (image.shape[1], image.shape[2])
        maps = self.pyramid(self.backbone.maps(image, tap=tap))
        maps = tuple(visit(self, tap, f"pyramid.level{level}", x) for level, x in enumerate(maps, 1))
        found = [self.rpn(x) for x in maps]
        objectness, deltas = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        boxes = anchors([(x.shape[1], x.shape[2]) for x in maps], size, cfg.anchor_sizes, cfg.anchor_ratios)
        counts = [part.shape[1] for part, _ in found]
        before, after = (numbers[0 if train else 1] for numbers in (cfg.decoded, cfg.proposals))
        best = propose(
            objectness, deltas, boxes, counts, size, before=before, after=after, overlap=cfg.proposal_overlap
        )
        return Regions(maps, boxes, objectness, deltas, best.boxes, best.valid)

    def classify(
        self, maps: tuple[jax.Array, ...], boxes: jax.Array, size: tuple[int, int], *, tap: Tap | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the second stage's logits [B, K, C] and deltas [B, K, C, 4] of boxes [B, K, 4].

        Args:
            maps: the pyramid of `regions`; the last level is for proposals only.
            boxes: in pixels of the images.
            size: (height, width) of the images.
            tap: sites to read or edit.
        """
        cfg = self.cfg
        scales = [2.0 ** round(math.log2(x.shape[1] / size[0])) for x in maps[:-1]]
        crops = pyramid_roi_align(maps[:-1], boxes, cfg.crop, scales, cfg.sampling, canonical=cfg.canonical)
        hidden = visit(self, tap, "final", self.box.read(constrain(crops, "batch", None, None, None, "width")))
        return self.box(hidden)


class Proposer(nn.Module):
    """One network for all levels: [B, H, W, D] -> objectness [B, H · W · R] and deltas [B, H · W · R, 4]."""

    width: int
    ratios: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Score and refine the anchors of a map: [B, H, W, D] -> [B, H · W · R], [B, H · W · R, 4] in float32."""
        init, batch = nn.initializers.normal(0.01), len(x)
        x = jax.nn.relu(conv(self.width, 3, ("mlp", "embed"), bias=True, init=init, dtype=self.dtype, name="hidden")(x))
        scores, deltas = (
            conv(count, 1, ("embed", None), bias=True, init=init, dtype=self.dtype, name=name)(x).astype(jnp.float32)
            for name, count in (("objectness", self.ratios), ("deltas", 4 * self.ratios))
        )
        return scores.reshape(batch, -1), deltas.reshape(batch, -1, 4)


class BoxHead(nn.Module):
    """Two hidden layers, and a linear one each for classes and boxes: crops [B, K, P, P, D] to [B, K, C (, 4)]."""

    classes: int
    width: int
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declare the layers."""
        wide = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's start of a linear layer
        self.hidden1 = WholeMap(self.width, wide, self.dtype)
        self.hidden2 = dense(self.width, ("mlp", "embed"), bias=True, init=wide, dtype=self.dtype)
        self.logits = dense(self.classes, ("embed", "classes"), bias=True, init=normal(0.01), dtype=jnp.float32)
        self.deltas = dense(4 * self.classes, ("embed", None), bias=True, init=normal(0.001), dtype=jnp.float32)

    def read(self, crops: jax.Array) -> jax.Array:
        """Return the features [B, K, head_width] of crops [B, K, P, P, D]."""
        return jax.nn.relu(self.hidden2(jax.nn.relu(self.hidden1(crops))))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return logits [B, K, C] and deltas [B, K, C, 4] of features [B, K, head_width], in float32."""
        x = x.astype(jnp.float32)
        return self.logits(x), self.deltas(x).reshape(*x.shape[:-1], self.classes, 4)


class WholeMap(nn.Module):
    """A dense layer that reads a whole crop: [..., P, P, D] -> [..., width]; the kernel is [P, P, D, width]."""

    width: int
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the features [..., width] of crops [..., P, P, D]."""
        shape = x.shape[-3:]

        def init(key: jax.Array, wanted: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return self.kernel_init(key, (math.prod(shape), self.width), dtype).reshape(wanted)

        boxed = nn.with_logical_partitioning(init, (None, None, "embed", "mlp"))
        kernel = self.param("kernel", boxed, (*shape, self.width), jnp.float32)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("mlp",))
        bias = self.param("bias", zeros, (self.width,), jnp.float32)
        flat = x.astype(self.dtype).reshape(*x.shape[:-3], -1)
        product = (((flat.ndim - 1,), (0,)), ((), ()))
        out = flat_dot_general(flat, kernel.astype(self.dtype).reshape(-1, self.width), product)
        return out + bias.astype(self.dtype).reshape((1,) * (out.ndim - 1) + (self.width,))


def detect(cfg: Config, outputs: Outputs, size: tuple[int, int]) -> Detections:
    """Return the detections of images: each proposal, refined for each class, without near duplicates of a class.

    Args:
        cfg: thresholds and the number of detections.
        outputs: of the model.
        size: (height, width) of the images, in pixels; boxes are clipped to it.
    """
    batch, _, classes = outputs.logits.shape
    scores = jax.nn.softmax(outputs.logits)[..., 1:]
    found = ops.decode(outputs.refined[:, :, 1:], outputs.proposals[:, :, None], WEIGHTS)
    found = ops.clip(found, *size)
    solid = ((found[..., 2:] - found[..., :2]) >= _THINNEST).all(axis=-1) & outputs.valid[..., None]
    ranks = jnp.where(solid & (scores > cfg.score), scores, -jnp.inf).reshape(batch, -1)
    found = found.reshape(batch, -1, 4)
    groups = jnp.tile(jnp.arange(classes - 1, dtype=jnp.int32), outputs.logits.shape[1])
    kept, valid = jax.vmap(lambda box, rank: ops.nms(box, rank, cfg.overlap, cfg.detections, groups))(found, ranks)
    boxes = jnp.take_along_axis(found, kept[..., None], axis=1)
    best = jnp.take_along_axis(ranks, kept, axis=1)
    return Detections(
        jnp.where(valid[..., None], boxes, 0.0), jnp.where(valid, best, 0.0), jnp.where(valid, groups[kept], 0), valid
    )
