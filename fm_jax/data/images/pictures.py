"""Labelled images to rows of one shape: augmented at each visit for training, centre crops for evaluation.

Rows are {"image": float32 [S, S, 3], normalised, "label": int32 [], "weights": float32 []}; two views are "image_a" and
"image_b", small ones "image_small" [K, S', S', 3].
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import augment, catalogue, digits, folder, scenes, views
from fm_jax.data.images.image import MAX_PIXELS, MOST_PIXELS, normalise
from fm_jax.data.images.views import Recipe

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
IMAGENET_TRAIN = 1_268_355  # training images of `imagenet()`, with one in a hundred held out
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision, DeiT, MAE, EfficientNet
Row = dict[str, np.ndarray]


class Pictures(Protocol):
    """Labelled images by random access."""

    name: str  # for messages
    fingerprint: str  # changes with the images
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return uint8 [H, W, 3] and the class; DataError if it cannot be decoded."""
        ...

    def id(self, index: int) -> str:
        """Return the image's name."""
        ...


@dataclass(frozen=True)
class Config:
    """Source and preprocessing of images; which fields are read depends on `kind`."""

    kind: Literal["digits", "scenes", "folder", "tfds"] = "digits"
    name: str = ""  # tfds: imagenet2012, cifar10, …
    path: Path | None = None  # folder: has folders train, validation and test, each with one folder per class
    splits: tuple[str, str, str] = SPLITS  # folder: names of the train, validation and test folders
    slices: tuple[str, str, str] = SPLITS  # tfds: train, validation and test as slices, such as train[:90%]
    scene: scenes.Config = scenes.Config()
    size: int = 8  # S: height and width in pixels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # normalisation, for values in 0 to 1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # normalisation, for values in 0 to 1
    recipe: Recipe = Recipe()  # training augmentation
    middle: float = 1.0  # evaluation: centre crop as a share of the shorter side; usual for ImageNet: 0.875
    stretch: bool = False  # evaluation: resize both sides to one length, ignoring the aspect ratio
    num_classes: int = 0  # 0: the number of classes of the data
    max_bad: float = 0.01  # share of images that may fail to decode
    max_pixels: int = MAX_PIXELS  # larger images are refused
    download: bool = False  # tfds: let tensorflow-datasets download and prepare a missing data set
    seed: int = 0  # digits: seed of the division into splits

    def __post_init__(self) -> None:
        """Check that values are in range."""
        if self.kind == "tfds" and not self.name:
            raise ConfigError("kind tfds needs a name, such as cifar10")
        if self.kind == "folder" and self.path is None:
            raise ConfigError("kind folder needs a path; set path to the folder of the splits")
        if self.size < 1 or not 0 < self.middle <= 1 or not 0 <= self.max_bad < 1:
            raise ConfigError(
                f"size {self.size} must be above 0, middle {self.middle} in 0 to 1, max_bad {self.max_bad} below 1"
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
    slices = ("train[:90%]", "train[90%:]", "test")
    return Config(kind="tfds", name=name, slices=slices, size=32, mean=mean, std=std, recipe=views.cifar())


def imagenet(size: int = 224) -> Config:
    """Return ImageNet-1k: 1 % of its training set is held out for validation, its validation set is the test."""
    slices = ("train[:99%]", "train[99%:]", "validation")
    return Config(
        kind="tfds",
        name="imagenet2012",
        slices=slices,
        size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        recipe=views.imagenet(),
        middle=0.875,
    )


def pictures(cfg: Config, split: str, data_dir: Path) -> Pictures:
    """Open one split: train, validation or test.

    Raises:
        DataError: missing, empty, or with more classes than `num_classes`.
    """
    if split not in SPLITS:
        raise DataError(f"images have no split {split!r}; choose {', '.join(SPLITS)}")
    images: Pictures
    number = SPLITS.index(split)
    if cfg.kind == "digits":
        images = digits.Digits(split, cfg.seed)
    elif cfg.kind == "scenes":
        images = scenes.Scenes(cfg.scene, split, cfg.size)
    elif cfg.kind == "folder":
        assert cfg.path is not None
        images = folder.ImageFolder(cfg.path, cfg.splits[number], classes_from=cfg.splits[0], max_pixels=cfg.max_pixels)
    else:
        images = catalogue.CatalogueImages(
            cfg.name, cfg.slices[number], data_dir, download=cfg.download, max_pixels=cfg.max_pixels
        )
    if cfg.num_classes and len(images.classes) > cfg.num_classes:
        raise DataError(
            f"{images.name} has {len(images.classes)} classes, more than num_classes {cfg.num_classes}; raise it"
        )
    return images


class Training:
    """Random views by the recipe at every visit (see `mixture.Drawn`); `source[index]` is always the same draw."""

    def __init__(self, images: Pictures, cfg: Config) -> None:
        self._decodable, self._cfg = Decodable(images, cfg.max_bad), cfg
        self.name = images.name
        self.fingerprint = _fingerprint(images, cfg, repr(cfg.recipe))
        self.limits: Mapping[str, int] = {"label": cfg.num_classes or len(images.classes)}

    def __len__(self) -> int:
        return len(self._decodable.pictures)

    def __getitem__(self, index: int) -> Row:
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return random views of one image; an image that cannot be decoded is replaced by the next one that can."""
        cfg, recipe = self._cfg, self._cfg.recipe
        image, label, _ = self._decodable.read(index)
        large, small = views.multi_crop(image, rng, cfg.size, recipe)

        def finish(drawn: np.ndarray) -> np.ndarray:
            return views.finished(drawn, rng, recipe, cfg.mean, cfg.std)

        names = ("image",) if recipe.views == 1 else ("image_a", "image_b")
        row = {name: finish(crop) for name, crop in zip(names, large, strict=True)}
        if recipe.small:
            row["image_small"] = np.stack([finish(crop) for crop in small])
        return row | {"label": np.array(label, np.int32), "weights": np.array(1, np.float32)}


class Evaluation:
    """The centre crop of every image, in order; an image that cannot be decoded has weight 0."""

    def __init__(self, images: Pictures, cfg: Config) -> None:
        self._decodable, self._cfg = Decodable(images, cfg.max_bad), cfg
        self.name = images.name
        self.fingerprint = _fingerprint(images, cfg, f"{cfg.middle}-{cfg.recipe.interpolation}-{cfg.stretch}")
        self.limits: Mapping[str, int] = {"label": cfg.num_classes or len(images.classes)}

    def __len__(self) -> int:
        return len(self._decodable.pictures)

    def __getitem__(self, index: int) -> Row:
        image, label, own = self._decodable.read(index)
        cfg = self._cfg
        how: dict[str, Any] = {"interpolation": cfg.recipe.interpolation, "stretch": cfg.stretch}
        crop = augment.centre(image, cfg.size, cfg.middle, **how)
        return {
            "image": normalise(crop, cfg.mean, cfg.std),
            "label": np.array(label, np.int32),
            "weights": np.array(float(own), np.float32),
        }


def training(cfg: Config, data_dir: Path) -> Training:
    """Open the training split for training."""
    return Training(pictures(cfg, "train", data_dir), cfg)


def evaluation(cfg: Config, split: str, data_dir: Path) -> Evaluation:
    """Open a split for evaluation."""
    return Evaluation(pictures(cfg, split, data_dir), cfg)


class Decodable:
    """Images in which the next decodable one replaces one that cannot be decoded, up to a share of `max_bad`.

    "Next" is in the images' own order, so rows do not depend on what was read before. Every process counts its own
    failures.
    """

    def __init__(self, images: Pictures, max_bad: float) -> None:
        self.pictures, self.max_bad = images, max_bad
        self.bad: dict[int, str] = {}

    def read(self, index: int) -> tuple[np.ndarray, int, bool]:
        """Return image uint8 [H, W, 3], class, and whether they are the row's own (False: a replacement).

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
                image, label = self.pictures[row]
            except DataError as error:
                self._count(row, error)
                continue
            views.check(image)
            return image, label, row == index
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


def _fingerprint(images: Pictures, cfg: Config, how: str) -> str:
    text = f"{images.fingerprint}/{cfg.size}/{cfg.mean}/{cfg.std}/{how}"
    return f"images-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
