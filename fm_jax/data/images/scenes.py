"""Synthetic scenes with known ground truth: one coloured shape or digit at a random place, size and rotation.

A scene is a function of (seed, split, index). A linear model on pixels cannot recognise the shape, because colour,
place, size, rotation and background are independent of it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import digits, photographs
from fm_jax.data.images.image import resize, to_bytes

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 40),
    "magenta": (205, 50, 200),
    "cyan": (40, 200, 215),
}
SPLITS = ("train", "validation", "test")
_FINE = 4  # samples per pixel and axis (antialiasing)

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Points (x, y) in units of the radius -> whether they are inside, or how opaque they are."""


@dataclass(frozen=True)
class Config:
    """Content and number of the scenes."""

    objects: Literal["shapes", "digits"] = "shapes"
    label: Literal["object", "colour", "both"] = "object"
    background: Literal["colour", "photograph"] = "colour"
    train: int = 4096
    validation: int = 512
    test: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse empty splits and a negative seed."""
        check_least(self, seed=0)
        if min(self.train, self.validation, self.test) < 1:
            raise ConfigError(
                "train, validation and test need at least 1 scene each, not "
                f"{self.train}, {self.validation} and {self.test}"
            )


class Scene(NamedTuple):
    """An image and its ground truth."""

    image: np.ndarray  # uint8 [S, S, 3]
    kind: int  # index into SHAPES, or the digit
    colour: int  # index into COLOURS
    box: tuple[float, float, float, float]  # the object's left, top, right, bottom, in pixels


class Scenes:
    """One split as (uint8 [S, S, 3], label)."""

    def __init__(self, cfg: Config, split: str, size: int) -> None:
        if split not in SPLITS:
            raise DataError(f"scenes have no split {split!r}; choose {', '.join(SPLITS)}")
        if size < 8:
            raise ConfigError(f"a scene needs at least 8 × 8 pixels, not {size}")
        self._cfg, self._split, self._size = cfg, SPLITS.index(split), size
        self._count = int(getattr(cfg, split))
        kinds = SHAPES if cfg.objects == "shapes" else digits.CLASSES
        both = tuple(f"{colour} {kind}" for kind in kinds for colour in COLOURS)
        self.classes = {"object": kinds, "colour": tuple(COLOURS), "both": both}[cfg.label]
        self.name = f"scenes/{split}"
        settings = "-".join(str(value) for value in asdict(cfg).values())
        self.fingerprint = f"scenes-1-{size}-{split}-{settings}"

    def __len__(self) -> int:
        return self._count

    def scene(self, index: int) -> Scene:
        """Return a scene with its ground truth."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        rng = np.random.default_rng((self._cfg.seed, self._split, index))
        return draw(self._cfg, rng, self._size, SPLITS[self._split])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, kind, colour, _ = self.scene(index)
        labels = {"object": kind, "colour": colour, "both": kind * len(COLOURS) + colour}
        return image, labels[self._cfg.label]

    def id(self, index: int) -> str:
        """Return the scene's index, as text."""
        return str(index)


def draw(cfg: Config, rng: np.random.Generator, size: int, split: str = "train") -> Scene:
    """Draw one scene of [size, size, 3]; the object lies inside the image, its radius is 22 to 42 % of the side.

    A digit is a handwritten one of the same split; the two background photographs are shared by all splits.
    """
    kind = int(rng.integers(len(SHAPES) if cfg.objects == "shapes" else 10))
    colour = int(rng.integers(len(COLOURS)))
    radius = rng.uniform(0.22, 0.42) * size
    x, y = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(-math.pi, math.pi) if cfg.objects == "shapes" else rng.uniform(-0.35, 0.35)
    behind = backdrop(cfg.background, rng, size)

    def shape(right: np.ndarray, below: np.ndarray) -> np.ndarray:
        return inside(kind, right, below) if cfg.objects == "shapes" else _digit(kind, rng, right, below, split)

    opacity = cover(shape, size, (float(x), float(y)), radius, angle)
    paint = np.array(list(COLOURS.values())[colour]) * rng.uniform(0.8, 1.0)
    image = behind + opacity[..., None] * (paint - behind)
    return Scene(to_bytes(image), kind, colour, box_around(opacity))


def backdrop(kind: Literal["colour", "photograph"], rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw what lies behind the objects: float64 [size, size, 3], 0 to 255."""
    return _colours(rng, size) if kind == "colour" else _photograph(rng, size)


def cover(shape: Shape, size: int, centre: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """Return how much of each pixel a turned shape covers: float64 [size, size], 0 to 1; centre (x, y) in pixels."""
    places = (np.arange(size * _FINE) + 0.5) / _FINE
    across, down = (places[None, :] - centre[0]) / radius, (places[:, None] - centre[1]) / radius
    right = across * math.cos(angle) + down * math.sin(angle)
    below = down * math.cos(angle) - across * math.sin(angle)
    fine = shape(right, below).astype(np.float64)
    opacity: np.ndarray = fine.reshape(size, _FINE, size, _FINE).mean(axis=(1, 3))
    return opacity


def box_around(opacity: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box (left, top, right, bottom) around all pixels of [H, W] that an object covers at all."""
    rows, columns = np.flatnonzero(opacity.any(axis=1)), np.flatnonzero(opacity.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def inside(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a bool array: which points (x, y), in units of the radius, are inside shape SHAPES[kind]."""
    distance, angle = np.hypot(x, y), np.arctan2(y, x)
    name = SHAPES[kind]
    if name == "circle":
        return distance < 1
    if name == "ring":
        return (distance < 1) & (distance > 0.55)
    if name == "square":
        return np.maximum(abs(x), abs(y)) < math.sqrt(0.5)
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.9)
    if name == "triangle":
        wedge = np.mod(angle, 2 * math.pi / 3) - math.pi / 3
        return distance * np.cos(wedge) < 0.5
    wedge = abs(np.mod(angle, 2 * math.pi / 5) - math.pi / 5)  # a star: straight from a tip at 1 to a notch at 0.42
    tip, notch = np.array([math.cos(math.pi / 5), math.sin(math.pi / 5)]), 0.42
    px, py = distance * np.cos(wedge), distance * np.sin(wedge)
    return (px - notch) * tip[1] - py * (tip[0] - notch) < 0


@cache
def _handwritten(split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = digits.load()
    rows = digits.rows(images, labels)[SPLITS.index(split)]
    return images[rows], labels[rows]


def _digit(kind: int, rng: np.random.Generator, x: np.ndarray, y: np.ndarray, split: str) -> np.ndarray:
    """Return the opacity, 0 to 1, of a random handwritten digit at points (x, y) in units of the radius."""
    images, labels = _handwritten(split)
    image = images[rng.choice(np.flatnonzero(labels == kind))]
    fine = np.minimum(
        resize(np.repeat(image[..., None], 3, axis=2), 64, 64)[..., 0] / 128, 1
    )  # full opacity from half intensity
    column, row = (np.floor((value * math.sqrt(2) + 1) * 32).astype(int) for value in (x, y))
    known = (column >= 0) & (column < 64) & (row >= 0) & (row < 64)
    return np.where(known, fine[np.clip(row, 0, 63), np.clip(column, 0, 63)], 0)


def _colours(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a linear gradient between two random colours, with noise: float64 [size, size, 3]."""
    first, second = rng.uniform(0, 255, (2, 3))
    direction, places = rng.uniform(0, 2 * math.pi), np.linspace(-0.5, 0.5, size)
    slope = places[None, :] * math.cos(direction) + places[:, None] * math.sin(direction) + 0.5
    return first + np.clip(slope, 0, 1)[..., None] * (second - first) + rng.normal(0, 12, (size, size, 3))


def _photograph(rng: np.random.Generator, size: int) -> np.ndarray:
    image = photographs.load(photographs.NAMES[int(rng.integers(len(photographs.NAMES)))])
    side = int(rng.integers(48, 200))
    top, left = (int(rng.integers(0, length - side)) for length in image.shape[:2])
    part = np.ascontiguousarray(image[top : top + side, left : left + side])
    return resize(part, size, size).astype(np.float64)
