"""From a picture to what a model trains on: one recipe of changes, once, twice, or in many crops."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import augment
from fm_jax.data.image import Interpolation, normalise
from fm_jax.data.rand_augment import TOP, rand_augment


@dataclass(frozen=True)
class Recipe:
    """What is drawn for every view, in the order of the fields; the default changes nothing."""

    place: Literal["centre", "crop", "pad", "affine"] = "centre"  # the middle; a random rectangle; CIFAR's; digits'
    area: tuple[float, float] = (0.08, 1.0)  # crop: share of the image
    affine: float = 1.0  # affine: how much; 1 is 12°, a tenth of the sides, of the size and of shear
    flip: float = 0.0  # probability
    jitter: float = 0.0  # at probability 0.8, brightness, contrast, saturation 0.8 and hue 0.2 times this
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability
    noise: float = 0.0  # standard deviation, in shares of the range
    layers: int = 0  # of RandAugment
    magnitude: float = 9.0  # of RandAugment, 0 to 10
    erase: float = 0.0  # probability
    views: int = 1  # of every image: 1 is "image", 2 are "image_a" and "image_b"
    small: int = 0  # more views of `small_size`, of 5 to 14 % of the area: "image_small" [small, S, S, 3]
    small_size: int = 96
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        for name in ("flip", "grey", "blur", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a probability, not {getattr(self, name)}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"area must be shares of the image in order, such as 0.08 1, not {self.area}")
        if min(self.jitter, self.noise, self.affine, self.layers, self.small) < 0 or not 0 <= self.magnitude <= TOP:
            raise ConfigError("jitter, noise, affine, layers and small must be at least 0, magnitude 0 to 10")
        if self.views not in (1, 2) or (self.small and self.small_size < 1):
            raise ConfigError(f"views must be 1 or 2, not {self.views}, and small_size above 0, not {self.small_size}")


def cifar() -> Recipe:
    """Return pad-and-crop with flips (He et al. 2015, section 4.2)."""
    return Recipe(place="pad", flip=0.5)


def imagenet() -> Recipe:
    """Return random rectangles with flips (Szegedy et al. 2015), which ResNet, and MAE's pretraining, use."""
    return Recipe(place="crop", flip=0.5)


def finetune() -> Recipe:
    """Return DeiT's (table 9), MAE's finetuning's too: RandAugment (2, 9), erasing; `data/mixing.py` mixes batches."""
    return Recipe(place="crop", flip=0.5, layers=2, magnitude=9.0, erase=0.25, interpolation="bicubic")


def simclr(strength: float = 1.0, blur: float = 0.5) -> Recipe:
    """Return SimCLR's two views (Chen et al. 2020, appendix A; CIFAR, by its README: strength 0.5 and no blur)."""
    return Recipe(place="crop", flip=0.5, jitter=strength, grey=0.2, blur=blur, views=2, interpolation="bicubic")


def swav() -> Recipe:
    """Return two large and six small views (README of facebookresearch/swav)."""
    return replace(simclr(), area=(0.14, 1.0), small=6, small_size=96)


def digits(views: int = 1) -> Recipe:
    """Return small movements that leave a digit what it is; for two views also brightness and noise."""
    if views == 1:
        return Recipe(place="affine")
    return Recipe(place="affine", jitter=0.25, noise=0.1, views=2)


def view(image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe) -> np.ndarray:
    """Draw one view, uint8 [size, size, 3], by all of a recipe but erasing, which comes after normalisation.

    Raises:
        DataError: an image that is not uint8 [H, W, 3].
    """
    check(image)
    image = _placed(image, rng, size, recipe)
    if recipe.flip:
        image = augment.flip(image, rng, recipe.flip)
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
    return rand_augment(image, rng, recipe.layers, recipe.magnitude) if recipe.layers else image


def two_view(
    image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two views of one image, independent of each other; by default SimCLR's."""
    recipe = recipe or simclr()
    return view(image, rng, size, recipe), view(image, rng, size, recipe)


def multi_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a recipe's large views, uint8 [views, size, size, 3], and its small ones, of 5 to 14 % of the area.

    By default SwAV's two and six. Source: Caron et al. 2020, section 3.2.
    """
    recipe = recipe or swav()
    little = replace(recipe, area=(0.05, 0.14))
    large = [view(image, rng, size, recipe) for _ in range(recipe.views)]
    small = [view(image, rng, recipe.small_size, little) for _ in range(recipe.small)]
    edge = recipe.small_size
    return np.stack(large), np.stack(small) if small else np.zeros((0, edge, edge, 3), np.uint8)


def finished(
    image: np.ndarray, rng: np.random.Generator, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Return a view normalised, float32, and with its erased part where the recipe has one."""
    values = normalise(image, mean, std)
    return augment.erase(values, rng, recipe.erase).astype(np.float32) if recipe.erase else values


def check(image: np.ndarray) -> None:
    """Refuse what is no colour image of bytes.

    Raises:
        DataError: not uint8 [H, W, 3], or of no pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")


def _placed(image: np.ndarray, rng: np.random.Generator, size: int, recipe: Recipe) -> np.ndarray:
    if recipe.place == "crop":
        return augment.random_resized_crop(image, rng, size, area=recipe.area, interpolation=recipe.interpolation)
    image = augment.centre(image, size, interpolation=recipe.interpolation)
    if recipe.place == "pad":
        return augment.pad_crop(image, rng, pad=max(1, size // 8))
    if recipe.place == "affine":
        s = recipe.affine
        return augment.affine(image, rng, degrees=12 * s, shift=0.1 * s, scale=0.1 * s, shear=0.1 * s)
    return image
