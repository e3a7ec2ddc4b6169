"""RandAugment: a few random operations of one common strength (Cubuk et al. 2019)."""

import math
from collections.abc import Callable

import numpy as np

from fm_jax.core.errors import ConfigError
from fm_jax.data.images import geometry
from fm_jax.data.images.augment import warp
from fm_jax.data.images.geometry import Move, Moved

TOP = 10.0  # the largest magnitude
Recolour = Callable[[np.ndarray, float, int], np.ndarray]


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, layers: int = 2, magnitude: float = 9.0
) -> tuple[np.ndarray, tuple[Move, ...]]:
    """Apply to [H, W, 3] `layers` operations, drawn with replacement from the paper's 14, at `magnitude` in 0 to 10.

    An operation with two directions takes a random one. timm's version, which DeiT and MAE use, differs: it skips each
    operation with probability 0.5, varies the magnitude with standard deviation 0.5, has invert and solarize-add, and
    no identity.

    Returns:
        The image [H, W, 3] and the moves of its operations.

    Raises:
        ConfigError: a magnitude out of range.
    """
    if not 0 <= magnitude <= TOP:
        raise ConfigError(f"RandAugment's magnitude must be in 0 to {TOP:g}, not {magnitude}")
    moves = []
    for number in rng.integers(0, len(OPERATIONS), layers):
        sign = 1 if rng.random() < 0.5 else -1
        image, move = OPERATIONS[list(OPERATIONS)[number]](image, magnitude / TOP, sign)
        moves.append(move)
    return image, tuple(moves)


def _rotate(image: np.ndarray, strength: float, sign: int) -> Moved:
    angle = math.radians(30 * strength) * sign
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return warp(image, turn, np.zeros(2))


def _shear_x(image: np.ndarray, strength: float, sign: int) -> Moved:
    return warp(image, np.array([[1, 0.3 * strength * sign], [0, 1]]), np.zeros(2))


def _shear_y(image: np.ndarray, strength: float, sign: int) -> Moved:
    return warp(image, np.array([[1, 0], [0.3 * strength * sign, 1]]), np.zeros(2))


def _translate_x(image: np.ndarray, strength: float, sign: int) -> Moved:
    return warp(image, np.eye(2), np.array([150 / 331 * image.shape[1] * strength * sign, 0]))


def _translate_y(image: np.ndarray, strength: float, sign: int) -> Moved:
    return warp(image, np.eye(2), np.array([0, 150 / 331 * image.shape[0] * strength * sign]))


def _autocontrast(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def _equalize(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def _posterize(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    lost = round(4 * strength)  # of the 8 bits
    return image >> lost << lost


def _solarize(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    return np.where(image >= 256 * (1 - strength), 255 - image, image)


def _enhance(name: str) -> Recolour:
    def change(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
        from PIL import Image, ImageEnhance

        enhancer = getattr(ImageEnhance, name)(Image.fromarray(image))
        return np.asarray(enhancer.enhance(1 + 0.9 * strength * sign))

    return change


def _in_place(recolour: Recolour) -> Callable[[np.ndarray, float, int], Moved]:
    return lambda image, strength, sign: (recolour(image, strength, sign), geometry.still(image))


OPERATIONS: dict[str, Callable[[np.ndarray, float, int], Moved]] = {
    "identity": _in_place(lambda image, strength, sign: image),
    "autocontrast": _in_place(_autocontrast),
    "equalize": _in_place(_equalize),
    "rotate": _rotate,
    "solarize": _in_place(_solarize),
    "color": _in_place(_enhance("Color")),
    "posterize": _in_place(_posterize),
    "contrast": _in_place(_enhance("Contrast")),
    "brightness": _in_place(_enhance("Brightness")),
    "sharpness": _in_place(_enhance("Sharpness")),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""Name -> function (image [H, W, 3], strength in 0 to 1, direction ±1) -> image and move; some ignore an argument."""
