"""Images and what is known of them to rows of one shape: augmented at each visit for training, centre crops else.

Rows are {"image": float32 [S, S, 3], normalised, "weights": float32 []}; two views are "image_a" and "image_b", small
ones "image_small" [K, S', S', 3]. What else a row has is made of the image's target: of a class "label", int32 [].
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import augment, catalogue, digits, folder, scenes, views
from fm_jax.data.images.image import MAX_PIXELS, MOST_PIXELS, normalise
from fm_jax.data.images.views import Recipe, View

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
IMAGENET_TRAIN = 1_268_355  # training images of `imagenet()`, with one in a hundred held out
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision, DeiT, MAE, EfficientNet
Row = dict[str, np.ndarray]
Source = digits.Config | scenes.Config | folder.Config | catalogue.Config
Target = TypeVar("Target")
Given = TypeVar("Given", covariant=True)
Taken = TypeVar("Taken", contravariant=True)


class Pictures(Protocol[Given]):
    """Images by random access, each with a target: a class, boxes, a mask, a caption."""

    name: str  # for messages
    fingerprint: str  # changes with the images

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, Given]:
        """Return uint8 [H, W, 3] and the target; DataError if the image cannot be decoded."""
        ...

    def id(self, index: int) -> str:
        """Return the image's name."""
        ...


class Labelled(Pictures[int], Protocol):
    """Images whose target is a class."""

    classes: tuple[str, ...]


class Fields(Protocol[Taken]):
    """What a row says of a target."""

    @property
    def limits(self) -> Mapping[str, int]:
        """Return the exclusive upper bounds of fields: see `stream.source.Source`."""
        ...

    def __call__(self, target: Taken, seen: Mapping[str, View]) -> Row:
        """Return fields of one shape; the row's large views, by name, say where its pixels went."""
        ...


@dataclass(frozen=True)
class Labels:
    """A class as the field "label"."""

    count: int  # of the classes

    @property
    def limits(self) -> Mapping[str, int]:
        """Return the number of classes as the bound of "label"."""
        return {"label": self.count}

    def __call__(self, target: int, seen: Mapping[str, View]) -> Row:
        """Return {"label": int32 []}, which no view changes."""
        return {"label": np.array(target, np.int32)}


@dataclass(frozen=True)
class Config:
    """Source and preprocessing of images."""

    source: Source = digits.Config()  # where the images are; its own options follow
    size: int = 8  # S: height and width in pixels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # normalisation, for values in 0 to 1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # normalisation, for values in 0 to 1
    recipe: Recipe = Recipe()  # training augmentation
    center_crop: float = 1.0  # evaluation: centre crop as a share of the shorter side; usual for ImageNet: 0.875
    stretch: bool = False  # evaluation: resize both sides to one length, ignoring the aspect ratio
    num_classes: int = 0  # 0: the number of classes of the data
    max_bad: float = 0.01  # share of images that may fail to decode
    max_pixels: int = MAX_PIXELS  # larger images are refused

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if self.size < 1 or not 0 < self.center_crop <= 1 or not 0 <= self.max_bad < 1:
            raise ConfigError(
                f"size {self.size} must be above 0, center_crop {self.center_crop} in 0 to 1, "
                f"max_bad {self.max_bad} below 1"
            )
        if not 0 < self.max_pixels <= MOST_PIXELS:
            raise ConfigError(f"max_pixels must be between 1 and {MOST_PIXELS:,}, not {self.max_pixels}")
        if min(self.std) <= 0 or self.num_classes < 0:
            raise ConfigError(f"std {self.std} must be above 0, num_classes {self.num_classes} at least 0")


def cifar(name: Literal["cifar10", "cifar100"] = "cifar10") -> Config:
    """Return CIFAR, with 5,000 images of the training set held out for validation."""
    moments = {  # usual values: over the pixels of all 50,000 training images
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    mean, std = moments[name]
    source = catalogue.Config(name, slices=("train[:90%]", "train[90%:]", "test"))
    return Config(source, size=32, mean=mean, std=std, recipe=views.cifar())


def imagenet(size: int = 224) -> Config:
    """Return ImageNet-1k: 1 % of its training set is held out for validation, its validation set is the test."""
    return Config(
        catalogue.Config("imagenet2012", slices=("train[:99%]", "train[99%:]", "validation")),
        size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        recipe=views.imagenet(),
        center_crop=0.875,
    )


def pictures(cfg: Config, split: str, data_dir: Path) -> Labelled:
    """Open one split: train, validation or test.

    Raises:
        DataError: missing, empty, or with more classes than `num_classes`.
    """
    if split not in SPLITS:
        raise DataError(f"images have no split {split!r}; choose {', '.join(SPLITS)}")
    images: Labelled
    number, most = SPLITS.index(split), cfg.max_pixels
    match cfg.source:
        case digits.Config(seed):
            images = digits.Digits(split, seed)
        case scenes.Config() as scene:
            images = scenes.Scenes(scene, split, cfg.size)
        case folder.Config(path, splits):
            images = folder.ImageFolder(path, splits[number], classes_from=splits[0], max_pixels=most)
        case catalogue.Config(name, slices, download):
            images = catalogue.CatalogueImages(name, slices[number], data_dir, download=download, max_pixels=most)
    if cfg.num_classes and len(images.classes) > cfg.num_classes:
        raise DataError(
            f"{images.name} has {len(images.classes)} classes, more than num_classes {cfg.num_classes}; raise it"
        )
    return images


def labels(images: Labelled, cfg: Config) -> Labels:
    """Return the fields of images with classes: at least as many as `num_classes`."""
    return Labels(cfg.num_classes or len(images.classes))


class Training(Generic[Target]):
    """Random views by the recipe at every visit (see `mixture.Drawn`); `source[index]` is always the same draw."""

    def __init__(self, images: Pictures[Target], cfg: Config, fields: Fields[Target]) -> None:
        self._decodable, self._cfg, self._fields = Decodable(images, cfg.max_bad), cfg, fields
        self.name = images.name
        self.fingerprint = _fingerprint(images, cfg, repr(cfg.recipe))
        self.limits: Mapping[str, int] = fields.limits

    def __len__(self) -> int:
        return len(self._decodable.pictures)

    def __getitem__(self, index: int) -> Row:
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return random views of one image; an image that cannot be decoded is replaced by the next one that can."""
        cfg, recipe = self._cfg, self._cfg.recipe
        image, target, _ = self._decodable.read(index)
        large, small = views.multi_crop(image, rng, cfg.size, recipe)

        def finish(view: View) -> np.ndarray:
            return views.finished(view.image, rng, recipe, cfg.mean, cfg.std)

        seen = dict(zip(("image",) if recipe.views == 1 else ("image_a", "image_b"), large, strict=True))
        row = {name: finish(view) for name, view in seen.items()}
        if recipe.small:
            row["image_small"] = np.stack([finish(view) for view in small])
        return row | self._fields(target, seen) | {"weights": np.array(1, np.float32)}


class Evaluation(Generic[Target]):
    """The centre crop of every image, in order; an image that cannot be decoded has weight 0."""

    def __init__(self, images: Pictures[Target], cfg: Config, fields: Fields[Target]) -> None:
        self._decodable, self._cfg, self._fields = Decodable(images, cfg.max_bad), cfg, fields
        self.name = images.name
        self.fingerprint = _fingerprint(images, cfg, f"{cfg.center_crop}-{cfg.recipe.interpolation}-{cfg.stretch}")
        self.limits: Mapping[str, int] = fields.limits

    def __len__(self) -> int:
        return len(self._decodable.pictures)

    def __getitem__(self, index: int) -> Row:
        image, target, own = self._decodable.read(index)
        cfg = self._cfg
        how: dict[str, Any] = {"interpolation": cfg.recipe.interpolation, "stretch": cfg.stretch}
        crop, move = augment.centre(image, cfg.size, cfg.center_crop, **how)
        row = {"image": normalise(crop, cfg.mean, cfg.std)}
        fields = self._fields(target, {"image": View(crop, (move,))})
        return row | fields | {"weights": np.array(float(own), np.float32)}


def training(cfg: Config, data_dir: Path) -> Training[int]:
    """Open the training split of images with classes for training."""
    images = pictures(cfg, "train", data_dir)
    return Training(images, cfg, labels(images, cfg))


def evaluation(cfg: Config, split: str, data_dir: Path) -> Evaluation[int]:
    """Open a split of images with classes for evaluation."""
    images = pictures(cfg, split, data_dir)
    return Evaluation(images, cfg, labels(images, cfg))


class Decodable(Generic[Target]):
    """Images in which the next decodable one replaces one that cannot be decoded, up to a share of `max_bad`.

    "Next" is in the images' own order, so rows do not depend on what was read before. Every process counts its own
    failures.
    """

    def __init__(self, images: Pictures[Target], max_bad: float) -> None:
        self.pictures, self.max_bad = images, max_bad
        self.bad: dict[int, str] = {}

    def read(self, index: int) -> tuple[np.ndarray, Target, bool]:
        """Return image uint8 [H, W, 3], target, and whether they are the row's own (False: a replacement).

        Raises:
            DataError: more than a share `max_bad` of the images cannot be decoded, or one has a wrong shape.
        """
        count = len(self.pictures)
        if not 0 <= index < count:
            raise IndexError(index)
        for row in (*range(index, count), *range(index)):
            if row in self.bad:
                continue
            try:
                image, target = self.pictures[row]
            except DataError as error:
                self._count(row, error)
                continue
            views.check(image)
            return image, target, row == index
        raise DataError(f"no image of {self.pictures.name} can be decoded")

    def _count(self, row: int, error: DataError) -> None:
        self.bad[row] = str(error)
        seen, total = len(self.bad), len(self.pictures)
        if seen > self.max_bad * total:
            first = "; ".join(list(self.bad.values())[:3])
            raise DataError(
                f"{seen} of {total} images cannot be decoded, more than max_bad {self.max_bad:g} allows; first: {first}"
            ) from error
        if seen & (seen - 1) == 0:  # 1, 2, 4, 8, …
            _log.warning(
                "%s: %d of %d images cannot be decoded so far and are replaced by others: %s",
                self.pictures.name, seen, total, error,
            )  # fmt: skip


def _fingerprint(images: Pictures[Any], cfg: Config, how: str) -> str:
    text = f"{images.fingerprint}/{cfg.size}/{cfg.mean}/{cfg.std}/{how}"
    return f"images-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
