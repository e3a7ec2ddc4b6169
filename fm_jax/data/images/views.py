"""Augmented views of an image for training: one recipe, applied once, twice, or for many crops."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import augment
from fm_jax.data.images.geometry import Move
from fm_jax.data.images.image import Interpolation, normalise
from fm_jax.data.images.rand_augment import TOP, rand_augment


@dataclass(frozen=True)
class Recipe:
    """Augmentations of every view, in the order of the fields; the default changes nothing."""

    geometry: Literal["centre", "crop", "pad", "affine"] = "centre"  # centre crop; random crop; pad and crop; affine
    area: tuple[float, float] = (0.08, 1.0)  # crop: smallest and largest share of the image's area
    affine: float = 1.0  # affine: strength; 1 is up to 12° rotation and 10 % shift, scale and shear
    flip: float = 0.0  # probability of a horizontal flip
    jitter: float = (
        0.0  # strength s of colour jitter (probability 0.8): brightness, contrast, saturation 0.8 s, hue 0.2 s
    )
    grey: float = 0.0  # probability of greyscale
    blur: float = 0.0  # probability of Gaussian blur
    noise: float = 0.0  # standard deviation of Gaussian noise, as a share of the range
    layers: int = 0  # RandAugment: number of operations
    magnitude: float = 9.0  # RandAugment: magnitude, 0 to 10
    erase: float = 0.0  # probability of random erasing
    views: int = 1  # views per image: 1 gives "image", 2 give "image_a" and "image_b"
    small: int = 0  # number of extra crops of 5 to 14 % of the area: "image_small" [small, S, S, 3]
    small_size: int = 96  # S of "image_small"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("flip", "grey", "blur", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a probability in 0 to 1, not {getattr(self, name)}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"area must be two ascending shares above 0 and up to 1, such as 0.08,1, not {self.area}")
        if min(self.jitter, self.noise, self.affine, self.layers, self.small) < 0 or not 0 <= self.magnitude <= TOP:
            raise ConfigError(
                "jitter, noise, affine, layers and small must be at least 0 and magnitude 0 to 10, not "
                f"{self.jitter}, {self.noise}, {self.affine}, {self.layers}, {self.small} and {self.magnitude}"
            )
        if self.views not in (1, 2) or (self.small and self.small_size < 1):
            raise ConfigError(f"views must be 1 or 2, not {self.views}; small_size above 0, not {self.small_size}")


class View(NamedTuple):
    """An image as a recipe shows it, and how its pixels came there: see `geometry.py`."""

    image: np.ndarray  # uint8 [S, S, 3]
    moves: tuple[Move, ...]


def cifar() -> Recipe:
    """Return CIFAR's recipe: pad and crop, flips (He et al. 2015, section 4.2)."""
    return Recipe(geometry="pad", flip=0.5)


def imagenet() -> Recipe:
    """Return random resized crops with flips (Szegedy et al. 2015), as for ResNet and for MAE's pretraining."""
    return Recipe(geometry="crop", flip=0.5)


def finetune() -> Recipe:
    """Return the recipe of DeiT (table 9) and MAE finetuning: RandAugment (2, 9), erasing; `mixup.py` adds mixup."""
    return Recipe(geometry="crop", flip=0.5, layers=2, magnitude=9.0, erase=0.25, interpolation="bicubic")


def simclr(strength: float = 1.0, blur: float = 0.5) -> Recipe:
    """Return SimCLR's two views (Chen et al. 2020, appendix A; its README for CIFAR: strength 0.5, no blur)."""
    return Recipe(geometry="crop", flip=0.5, jitter=strength, grey=0.2, blur=blur, views=2, interpolation="bicubic")


def swav() -> Recipe:
    """Return SwAV's two large and six small views (README of facebookresearch/swav)."""
    return replace(simclr(), area=(0.14, 1.0), small=6, small_size=96)


def digits(views: int = 1) -> Recipe:
    """Return small affine changes that keep a digit recognisable; two views also get colour jitter and noise."""
    if views == 1:
        return Recipe(geometry="affine")
    return Recipe(geometry="affine", jitter=0.25, noise=0.1, views=2)


def view(image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe) -> View:
    """Draw one view, uint8 [size, size, 3], of [H, W, 3]; erasing follows after normalisation, in `finished`.

    Raises:
        DataError: an image that is not uint8 [H, W, 3].
    """
    check(image)
    image, moves = _placed(image, rng, size, recipe)
    if recipe.flip:
        image, flipped = augment.flip(image, rng, recipe.flip)
        moves += (flipped,)
    if recipe.jitter and rng.random() < 0.8:
        s = recipe.jitter
        image = augment.color_jitter(
            image, rng, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=min(0.2 * s, 0.5)
        )
    if recipe.grey and rng.random() < recipe.grey:
        image = augment.greyscale(image)
    if recipe.blur and rng.random() < recipe.blur:
        image = augment.blur(image, rng)
    if recipe.noise:
        image = augment.noise(image, rng, recipe.noise)
    if recipe.layers:
        image, more = rand_augment(image, rng, recipe.layers, recipe.magnitude)
        moves += more
    return View(image, moves)


def two_view(image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe | None = None) -> tuple[View, View]:
    """Draw two independent views, uint8 [size, size, 3], of [H, W, 3]; the default recipe is SimCLR's."""
    recipe = recipe or simclr()
    return view(image, rng, size, recipe), view(image, rng, size, recipe)


def multi_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe | None = None
) -> tuple[list[View], list[View]]:
    """Draw large views, uint8 [size, size, 3], and small ones, uint8 [S, S, 3], of 5 to 14 % of the area.

    The default recipe is SwAV's: two large, six small. Source: Caron et al. 2020, section 3.2.
    """
    recipe = recipe or swav()
    little = replace(recipe, area=(0.05, 0.14))
    large = [view(image, rng, size, recipe) for _ in range(recipe.views)]
    small = [view(image, rng, recipe.small_size, little) for _ in range(recipe.small)]
    return large, small


def finished(
    image: np.ndarray, rng: np.random.Generator, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Normalise a view, uint8 [H, W, 3] to float32 [H, W, 3], and apply random erasing if the recipe has it."""
    values = normalise(image, mean, std)
    return augment.erase(values, rng, recipe.erase).astype(np.float32) if recipe.erase else values


def check(image: np.ndarray) -> None:
    """Refuse an array that is not an RGB image of bytes.

    Raises:
        DataError: not uint8 [H, W, 3], or without pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")


def _placed(
    image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe
) -> tuple[np.ndarray, tuple[Move, ...]]:
    if recipe.geometry == "crop":
        image, cut = augment.random_resized_crop(image, rng, size, area=recipe.area, interpolation=recipe.interpolation)
        return image, (cut,)
    image, cut = augment.centre(image, size, interpolation=recipe.interpolation)
    if recipe.geometry == "pad":
        image, move = augment.pad_crop(image, rng, pad=max(1, size // 8))
        return image, (cut, move)
    if recipe.geometry == "affine":
        s = recipe.affine
        image, move = augment.affine(image, rng, degrees=12 * s, shift=0.1 * s, scale=0.1 * s, shear=0.1 * s)
        return image, (cut, move)
    return image, (cut,)
