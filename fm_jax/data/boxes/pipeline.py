"""Images with boxes to rows of one shape: augmented at each visit for training, fitted into the input for evaluation.

Rows are {"images": float32 [H, W, 3], normalised RGB, "boxes": float32 [M, 4] in pixels of that input, "labels": int32
[M], "box_mask": bool [M], "weights": float32 []}; where the mask is False, boxes and labels are 0. Rows for evaluation
also have "size", int32 [2], the height and width of the image as it was, and "index", int32 [], its place in the split:
`restore` moves boxes back into it, and the split's `record` has all that scoring needs.
"""

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes import augment, catalogue, coco, scenes, voc, yolo
from fm_jax.data.boxes.augment import Canvas, Recipe, Size
from fm_jax.data.boxes.record import Annotated, Limits, Objects, chosen, same_classes
from fm_jax.data.images import geometry
from fm_jax.data.images.geometry import Move
from fm_jax.data.images.image import MAX_PIXELS, MOST_PIXELS, normalise
from fm_jax.data.images.pictures import SPLITS, Decodable

_log = logging.getLogger(__name__)

Row = dict[str, np.ndarray]
Source = scenes.Config | coco.Config | voc.Config | yolo.Config | catalogue.Config


@dataclass(frozen=True)
class Config:
    """Source and preprocessing of images with boxes."""

    source: Source = scenes.Config()  # where the images are; its own options follow
    size: tuple[int, int] = (64, 64)  # H and W of the network's input, in pixels
    fit: Literal["letterbox", "short"] = "letterbox"  # as large as fits; or by the lengths of `sides`
    sides: tuple[int, int] = (800, 1333)  # fit short: of the shorter side, unless the longer one passes the second
    fill: int = 114  # grey level where no image is
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # normalisation, for values in 0 to 1
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # normalisation, for values in 0 to 1
    recipe: Recipe = Recipe()  # training augmentation
    max_boxes: int = 100  # M: objects in a row; of more, the largest are kept, and how many were not is logged
    num_classes: int = 0  # 0: the number of classes of the data
    difficult: bool = False  # train on objects that are marked as difficult
    max_bad: float = 0.01  # share of images, and of boxes, that may be unusable
    max_pixels: int = MAX_PIXELS  # larger images are refused

    def __post_init__(self) -> None:
        """Check that values are in range."""
        check_least(self, max_boxes=1, num_classes=0, fill=0)
        if min(*self.size, *self.sides) < 1 or self.fill > 255 or not 0 <= self.max_bad < 1:
            raise ConfigError(
                f"size {self.size} and sides {self.sides} must be above 0, fill {self.fill} at most 255, "
                f"max_bad {self.max_bad} in 0 to 1"
            )
        if not 0 < self.max_pixels <= MOST_PIXELS or min(self.std) <= 0:
            raise ConfigError(f"max_pixels must be 1 to {MOST_PIXELS:,}, not {self.max_pixels}; std above 0")
        for height in self.recipe.sizes:
            if height * self.size[1] % self.size[0]:
                raise ConfigError(f"recipe.sizes: height {height} has no whole width in the shape of size {self.size}")


def open_split(cfg: Config, split: str, data_dir: Path) -> Annotated:
    """Open one split: train, validation or test.

    Raises:
        DataError: missing, empty, too much of it unusable, or with more classes than `num_classes`.
    """
    if split not in SPLITS:
        raise DataError(f"images have no split {split!r}; choose {', '.join(SPLITS)}")
    images: Annotated
    number, limits = SPLITS.index(split), Limits(cfg.max_pixels, cfg.max_bad)
    match cfg.source:
        case scenes.Config() as scene:
            images = scenes.Scenes(scene, split)
        case coco.Config(path, files, folders):
            images = coco.read(path / files[number], path / folders[number], limits=limits)
        case voc.Config(path, lists, classes):
            images = voc.read(path, lists[number], classes=classes, classes_from=lists[0], limits=limits)
        case yolo.Config(path, places):
            images = yolo.read(path, places[number], limits=limits)
        case catalogue.Config(name, slices, download):
            images = catalogue.CatalogueBoxes(name, slices[number], data_dir, download=download, limits=limits)
    if cfg.num_classes and len(images.classes) > cfg.num_classes:
        raise DataError(
            f"{images.name} has {len(images.classes)} classes, more than num_classes {cfg.num_classes}; raise it"
        )
    return images


def open_splits(cfg: Config, data_dir: Path) -> dict[str, Annotated]:
    """Open all three splits.

    Raises:
        DataError: as `open_split`, or two splits number their classes differently.
    """
    opened = {split: open_split(cfg, split, data_dir) for split in SPLITS}
    for split in SPLITS[1:]:
        same_classes(opened["train"], opened[split])
    return opened


def move(cfg: Config, old: Sequence[int], size: Size | None = None) -> Move:
    """Return the move of an image of size `old` (height, width) into the network's input, by default of `cfg.size`."""
    size = size or cfg.size
    if cfg.fit == "letterbox":
        return geometry.letterbox(old, size)
    ratio = size[0] / cfg.size[0]
    return geometry.short_side(old, size, *(side * ratio for side in cfg.sides))


def resized(cfg: Config, size: Size) -> Config:
    """Return the preprocessing for another input size; the lengths of `sides` grow with its height."""
    short, long = (round(side * size[0] / cfg.size[0]) for side in cfg.sides)
    return replace(cfg, size=size, sides=(short, long), recipe=Recipe())


def restore(cfg: Config, boxes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Move boxes [N, 4] from the network's input back into their image, of `size` (height, width): float64 [N, 4]."""
    return geometry.restore(boxes, (move(cfg, size),), size)


class _Rows:
    """What rows for training and for evaluation have in common."""

    def __init__(self, images: Annotated, cfg: Config, how: str) -> None:
        self._decodable, self._cfg, self._over = Decodable(images, cfg.max_bad), cfg, Counter[str]()
        self.name, self.classes = images.name, images.classes
        text = f"{images.fingerprint}/{cfg.mean}/{cfg.std}/{cfg.size}/{cfg.fit}/{cfg.sides}/{cfg.fill}/{cfg.max_boxes}"
        text += f"/{cfg.difficult}/{how}"
        self.fingerprint = f"boxes-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.limits: Mapping[str, int] = {"labels": cfg.num_classes or len(images.classes)}

    def __len__(self) -> int:
        return len(self._decodable.pictures)

    @property
    def left_out(self) -> int:
        """Return how many boxes did not fit into `max_boxes` in the rows that this process has read."""
        return self._over["boxes"]

    def _read(self, index: int) -> tuple[np.ndarray, Objects, bool]:
        """Return an image, its objects but for crowds and, unless wanted, difficult ones, and whether it is its own."""
        image, objects, own = self._decodable.read(index)
        kept = ~objects.crowd & (self._cfg.difficult | ~objects.difficult)
        return image, chosen(objects, kept), own

    def _row(self, canvas: Canvas, visible: float, least: float) -> Row:
        cfg, most = self._cfg, self._cfg.max_boxes
        boxes, labels = augment.seen(canvas, visible, least)
        if (count := len(labels)) > most:
            self._count(count - most)
            area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            largest = np.sort(np.argsort(-area, kind="stable")[:most])
            boxes, labels, count = boxes[largest], labels[largest], most
        padding = most - count
        return {
            "images": normalise(canvas.image, cfg.mean, cfg.std),
            "boxes": np.pad(boxes, ((0, padding), (0, 0))).astype(np.float32),
            "labels": np.pad(labels, (0, padding)).astype(np.int32),
            "box_mask": np.arange(most) < count,
        }

    def _count(self, extra: int) -> None:
        before = self.left_out
        self._over["boxes"] += extra
        if self.left_out.bit_length() > before.bit_length():  # 1, 2, 4, 8, …
            _log.warning(
                "%s: %d boxes so far did not fit into max_boxes %d and are left out; raise it to keep them",
                self.name, self.left_out, self._cfg.max_boxes,
            )  # fmt: skip


class Training(_Rows):
    """Images augmented by the recipe at every visit (see `stream.source.Drawn`)."""

    def __init__(self, images: Annotated, cfg: Config) -> None:
        super().__init__(images, cfg, repr(sorted(asdict(cfg.recipe).items())))
        self._recipe, self._size = cfg.recipe, cfg.size

    def __getitem__(self, index: int) -> Row:
        """Return always the same draw."""
        return self.draw(index, np.random.default_rng(index))

    def at(self, step: int, seed: int) -> "Training":
        """Return the rows as batch `step` has them: of that step's size, and by the recipe or what is left at its end.

        The size depends on (seed, step) only, so all rows of a batch have the same on every host.
        """
        recipe, size = self._recipe, self._size
        if recipe.close and step >= recipe.close:
            recipe = replace(recipe, mosaic=0.0, degrees=0.0, shear=0.0, scale=(1.0, 1.0), shift=0.0, mixup=0.0)
        if recipe.sizes:
            rng = np.random.default_rng((seed % 2**32, 2, step // recipe.every))
            height = recipe.sizes[int(rng.integers(len(recipe.sizes)))]
            size = (height, height * self._cfg.size[1] // self._cfg.size[0])
        now = copy.copy(self)
        now._recipe, now._size = recipe, size
        return now

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return one image and its boxes, augmented; one that cannot be decoded is replaced by the next that can."""
        cfg, recipe = self._cfg, self._recipe
        canvas = augment.augmented(
            lambda number: self._read(number)[:2], index, len(self), rng, recipe,
            lambda old: move(cfg, old, self._size), cfg.fill,
        )  # fmt: skip
        return self._row(canvas, recipe.visible, recipe.least) | {"weights": np.array(1, np.float32)}


class Evaluation(_Rows):
    """Every image, fitted into the input, in order; one that cannot be decoded has weight 0."""

    def __init__(self, images: Annotated, cfg: Config) -> None:
        super().__init__(images, cfg, "evaluation")
        self.images = images
        """The split, whose records have all objects, crowds and difficult ones too."""

    def __getitem__(self, index: int) -> Row:
        image, objects, own = self._read(index)
        canvas = augment.fitted((image, objects), move(self._cfg, image.shape[:2]), self._cfg.fill)
        return self._row(canvas, 0.0, 0.0) | {
            "size": np.array(image.shape[:2], np.int32),
            "index": np.array(index, np.int32),
            "weights": np.array(float(own), np.float32),
        }
