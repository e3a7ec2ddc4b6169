"""Pictures to rows of one shape: views drawn anew at each visit for training, the same ones for evaluation.

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
from fm_jax.data import augment, digits, image_catalogue, image_folder, scenes, views
from fm_jax.data.image import MAX_PIXELS, MOST_PIXELS, normalise
from fm_jax.data.views import Recipe

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
IMAGENET_TRAIN = 1_268_355  # training images of `imagenet()`, with one in a hundred held out
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as torchvision, DeiT, MAE, EfficientNet
Row = dict[str, np.ndarray]


class Pictures(Protocol):
    """Labelled images by random access."""

    name: str  # for messages
    fingerprint: str  # changes with the images
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return uint8 [H, W, 3] and the class; DataError where it cannot be decoded."""
        ...

    def id(self, index: int) -> str:
        """Return what an image is called."""
        ...


@dataclass(frozen=True)
class Config:
    """Where images come from and what the model sees of them; which fields are read depends on `kind`."""

    kind: Literal["digits", "scenes", "folder", "tfds"] = "digits"
    name: str = ""  # tfds: imagenet2012, cifar10, …
    path: Path | None = None  # folder: of folders train, validation and test, each of a folder a class
    splits: tuple[str, str, str] = SPLITS  # folder: what train, validation and test are called there
    slices: tuple[str, str, str] = SPLITS  # tfds: what they are of a data set, such as train[:90%]
    scene: scenes.Config = scenes.Config()
    size: int = 8  # S: pixels of a side
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of values in 0 to 1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    recipe: Recipe = Recipe()  # of training
    middle: float = 1.0  # evaluation: share of the shorter side that is seen; ImageNet's custom is 0.875
    stretch: bool = False  # evaluation: scale both sides to one length, whatever the image's form
    num_classes: int = 0  # 0: as many as there are
    max_bad: float = 0.01  # share of images that may fail to decode
    max_pixels: int = MAX_PIXELS
    download: bool = False  # tfds: let tensorflow-datasets fetch what is not prepared yet
    seed: int = 0  # digits: of the division into splits

    def __post_init__(self) -> None:
        """Refuse what cannot be opened or seen."""
        if self.kind == "tfds" and not self.name:
            raise ConfigError("kind tfds needs a name, such as cifar10")
        if self.kind == "folder" and self.path is None:
            raise ConfigError("kind folder needs a path")
        if self.size < 1 or not 0 < self.middle <= 1 or not 0 <= self.max_bad < 1:
            raise ConfigError(
                f"size {self.size} must be above 0, middle {self.middle} in 0 to 1, max_bad {self.max_bad} below 1"
            )
        if not 0 < self.max_pixels <= MOST_PIXELS:
            raise ConfigError(f"max_pixels must be within 1 and {MOST_PIXELS:,}, not {self.max_pixels}")
        if min(self.std) <= 0 or self.num_classes < 0:
            raise ConfigError(f"std {self.std} must be above 0, and num_classes {self.num_classes} not below")


def cifar(name: Literal["cifar10", "cifar100"] = "cifar10") -> Config:
    """Return CIFAR, with 5,000 images of the training set held out for validation."""
    moments = {  # of the pixels of all 50,000 training images, as is usual
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    mean, std = moments[name]
    slices = ("train[:90%]", "train[90%:]", "test")
    return Config(kind="tfds", name=name, slices=slices, size=32, mean=mean, std=std, recipe=views.cifar())


def imagenet(size: int = 224) -> Config:
    """Return ImageNet-1k, with one in a hundred training images held out, and tested on its validation set."""
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
        raise DataError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    found: Pictures
    number = SPLITS.index(split)
    if cfg.kind == "digits":
        found = digits.Digits(split, cfg.seed)
    elif cfg.kind == "scenes":
        found = scenes.Scenes(cfg.scene, split, cfg.size)
    elif cfg.kind == "folder":
        assert cfg.path is not None
        found = image_folder.ImageFolder(
            cfg.path, cfg.splits[number], classes_from=cfg.splits[0], max_pixels=cfg.max_pixels
        )
    else:
        found = image_catalogue.CatalogueImages(
            cfg.name, cfg.slices[number], data_dir, download=cfg.download, max_pixels=cfg.max_pixels
        )
    if cfg.num_classes and len(found.classes) > cfg.num_classes:
        raise DataError(f"{found.name} has {len(found.classes)} classes, more than num_classes {cfg.num_classes}")
    return found


class Training:
    """Views drawn by the recipe at every visit (see `mixture.Drawn`); `source[index]` is always the same draw."""

    def __init__(self, found: Pictures, cfg: Config) -> None:
        self._sound, self._cfg = Sound(found, cfg.max_bad), cfg
        self.name = found.name
        self.fingerprint = _fingerprint(found, cfg, repr(cfg.recipe))
        self.limits: Mapping[str, int] = {"label": cfg.num_classes or len(found.classes)}

    def __len__(self) -> int:
        return len(self._sound.pictures)

    def __getitem__(self, index: int) -> Row:
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Row:
        """Return the views of one image; an image that cannot be decoded is replaced by the next one that can."""
        cfg, recipe = self._cfg, self._cfg.recipe
        image, label, _ = self._sound.read(index)
        large, small = views.multi_crop(image, rng, cfg.size, recipe)

        def finish(drawn: np.ndarray) -> np.ndarray:
            return views.finished(drawn, rng, recipe, cfg.mean, cfg.std)

        names = ("image",) if recipe.views == 1 else ("image_a", "image_b")
        row = {name: finish(one) for name, one in zip(names, large, strict=True)}
        if recipe.small:
            row["image_small"] = np.stack([finish(one) for one in small])
        return row | {"label": np.array(label, np.int32), "weights": np.array(1, np.float32)}


class Evaluation:
    """The middle of every image, in order. What cannot be decoded has weight 0, so it counts for nothing."""

    def __init__(self, found: Pictures, cfg: Config) -> None:
        self._sound, self._cfg = Sound(found, cfg.max_bad), cfg
        self.name = found.name
        self.fingerprint = _fingerprint(found, cfg, f"{cfg.middle}-{cfg.recipe.interpolation}-{cfg.stretch}")
        self.limits: Mapping[str, int] = {"label": cfg.num_classes or len(found.classes)}

    def __len__(self) -> int:
        return len(self._sound.pictures)

    def __getitem__(self, index: int) -> Row:
        image, label, own = self._sound.read(index)
        cfg = self._cfg
        how: dict[str, Any] = {"interpolation": cfg.recipe.interpolation, "stretch": cfg.stretch}
        seen = augment.centre(image, cfg.size, cfg.middle, **how)
        return {
            "image": normalise(seen, cfg.mean, cfg.std),
            "label": np.array(label, np.int32),
            "weights": np.array(float(own), np.float32),
        }


def training(cfg: Config, data_dir: Path) -> Training:
    """Open the training split for training."""
    return Training(pictures(cfg, "train", data_dir), cfg)


def evaluation(cfg: Config, split: str, data_dir: Path) -> Evaluation:
    """Open a split for evaluation."""
    return Evaluation(pictures(cfg, split, data_dir), cfg)


class Sound:
    """Pictures in which the next one that can be decoded stands in for one that cannot, up to a share of `max_bad`.

    The order is the pictures' own, so the rows do not depend on what was read before. Every process counts for itself
    what it has met.
    """

    def __init__(self, found: Pictures, max_bad: float) -> None:
        self.pictures, self.max_bad = found, max_bad
        self.bad: dict[int, str] = {}

    def read(self, index: int) -> tuple[np.ndarray, int, bool]:
        """Return image, class, and whether they are the row's own.

        Raises:
            DataError: more images than `max_bad` cannot be decoded (the first are named), or one of a wrong shape.
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
        raise DataError("no image can be decoded")

    def _count(self, row: int, error: DataError) -> None:
        self.bad[row] = str(error)
        seen, total = len(self.bad), len(self.pictures)
        if seen > self.max_bad * total:
            first = "; ".join(list(self.bad.values())[:3])
            raise DataError(
                f"{seen} of {total} images cannot be decoded, more than max_bad {self.max_bad:g} allows: {first}"
            ) from error
        if seen & (seen - 1) == 0:  # 1, 2, 4, 8, …
            _log.warning(
                "%s: %d of %d images so far cannot be decoded, others stand in: %s",
                self.pictures.name, seen, total, error,
            )  # fmt: skip


def _fingerprint(found: Pictures, cfg: Config, how: str) -> str:
    text = f"{found.fingerprint}/{cfg.size}/{cfg.mean}/{cfg.std}/{how}"
    return f"images-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
