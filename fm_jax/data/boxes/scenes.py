"""Generated scenes of one to three coloured shapes with their true boxes: detection where the truth is known exactly.

A scene is a function of (seed, split, index). A shape drawn later may hide a part of an earlier one, whose box stays
that of the whole shape; no two boxes share more than a set part of the smaller one.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes.record import Faults, Found, Objects, Record
from fm_jax.data.images.image import to_bytes
from fm_jax.data.images.scenes import COLOURS, SHAPES, SPLITS, backdrop, box_around, cover, inside

_TRIES = 20  # places tried for a further object; without one, the scene has fewer


@dataclass(frozen=True)
class Config:
    """Content and number of the scenes."""

    side: int = 64  # of the square images, in pixels
    kinds: int = 4  # classes: the first of circle, square, triangle, star, cross, ring
    most: int = 3  # objects in a scene, 1 to this many
    radius: tuple[float, float] = (0.1, 0.25)  # of a shape, as a share of the side
    overlap: float = 0.2  # of the smaller of two boxes, the part that the other may share
    background: Literal["colour", "photograph"] = "colour"
    train: int = 4096
    validation: int = 256
    test: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that values are in range."""
        check_least(self, side=16, most=1, train=1, validation=1, test=1, seed=0)
        if not 2 <= self.kinds <= len(SHAPES):
            raise ConfigError(f"kinds must be 2 to {len(SHAPES)}, not {self.kinds}")
        if not 0 < self.radius[0] <= self.radius[1] < 0.5 or not 0 <= self.overlap <= 1:
            raise ConfigError(
                f"radius must be two ascending shares above 0 and below 0.5, not {self.radius}; overlap 0 to 1, not "
                f"{self.overlap}"
            )


class Scene(NamedTuple):
    """An image and its ground truth."""

    image: np.ndarray  # uint8 [S, S, 3]
    objects: Objects
    owner: np.ndarray  # uint8 [S, S]: 0 the background, i + 1 where object i covers half of the pixel or more


class Scenes:
    """One split as (uint8 [S, S, 3], objects)."""

    def __init__(self, cfg: Config, split: str) -> None:
        if split not in SPLITS:
            raise DataError(f"scenes have no split {split!r}; choose {', '.join(SPLITS)}")
        self._cfg, self._split, self._count = cfg, SPLITS.index(split), int(getattr(cfg, split))
        self.classes, self.name = SHAPES[: cfg.kinds], f"scenes/{split}"
        self.fingerprint = f"boxes-scenes-1-{split}-" + "-".join(str(value) for value in asdict(cfg).values())

    def __len__(self) -> int:
        return self._count

    def scene(self, index: int) -> Scene:
        """Return a scene with its ground truth."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        return draw(self._cfg, np.random.default_rng((self._cfg.seed, self._split, index)))

    def __getitem__(self, index: int) -> tuple[np.ndarray, Objects]:
        image, objects, _ = self.scene(index)
        return image, objects

    def record(self, index: int) -> Record:
        """Return what is known of a scene, which is drawn for it."""
        return Record(index, (self._cfg.side, self._cfg.side), self.scene(index).objects)

    def id(self, index: int) -> str:
        """Return the scene's index, as text."""
        return str(index)


def draw(cfg: Config, rng: np.random.Generator) -> Scene:
    """Draw one scene."""
    side = cfg.side
    image = backdrop(cfg.background, rng, side)
    owner, found = np.zeros((side, side), np.uint8), list[Found]()
    for _ in range(int(rng.integers(1, cfg.most + 1))):
        for _ in range(_TRIES):
            radius = rng.uniform(*cfg.radius) * side
            x, y = rng.uniform(radius, side - radius, 2).tolist()
            kind, colour = int(rng.integers(cfg.kinds)), int(rng.integers(len(COLOURS)))
            angle, light = rng.uniform(-math.pi, math.pi), rng.uniform(0.8, 1.0)
            opacity, corner, box = _shape(kind, side, (x, y), radius, angle)
            if all(_shared(box, other.box) <= cfg.overlap for other in found):
                break
        else:
            continue
        paint = np.array(list(COLOURS.values())[colour]) * light
        rows, columns = (slice(start, start + len(opacity)) for start in corner)
        image[rows, columns] += opacity[..., None] * (paint - image[rows, columns])
        found.append(Found("", box, kind))
        owner[rows, columns][opacity >= 0.5] = len(found)
    return Scene(to_bytes(image), Faults("scenes").objects(found, (side, side), cfg.kinds), owner)


def _shape(
    kind: int, side: int, centre: tuple[float, float], radius: float, angle: float
) -> tuple[np.ndarray, tuple[int, int], tuple[float, float, float, float]]:
    """Return a shape's opacity in the square around it [S, S], the row and column of that one's corner, and the box."""
    size = min(2 * math.ceil(radius) + 1, side)
    left, top = (min(math.floor(place - radius), side - size) for place in centre)
    opacity = cover(lambda x, y: inside(kind, x, y), size, (centre[0] - left, centre[1] - top), radius, angle)
    x0, y0, x1, y1 = box_around(opacity)
    return opacity, (top, left), (x0 + left, y0 + top, x1 + left, y1 + top)


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the part of the smaller of two boxes that both share."""
    one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2])
    least = min(np.prod(box[2:] - box[:2]) for box in (one, two))
    return float(np.prod(np.maximum(sides, 0)) / least)
