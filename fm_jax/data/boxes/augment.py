"""Augmentations of images with boxes; boxes follow the pixels exactly, through every crop and turn.

An image under way is a canvas: its pixels, and for every picture in it the objects and the moves that brought it there.
Boxes are moved once, at the end: only then is known which share of each is left to see. The number of draws from a
generator depends only on the recipe and the sizes of the images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fm_jax.core.errors import ConfigError
from fm_jax.data.boxes.record import Objects
from fm_jax.data.images import augment, geometry
from fm_jax.data.images.geometry import Move
from fm_jax.data.images.image import resize, to_bytes

Picture = tuple[np.ndarray, Objects]  # uint8 [H, W, 3] and what is in it
Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Recipe:
    """Augmentations for training, in their order; the default changes nothing."""

    mosaic: float = 0.0  # probability that four images are joined (Bochkovskiy et al. 2020)
    degrees: float = 0.0  # largest rotation
    shear: float = 0.0  # largest shear, in degrees
    scale: tuple[float, float] = (1.0, 1.0)  # smallest and largest factor of the size
    shift: float = 0.0  # largest shift, as a share of each side
    mixup: float = 0.0  # probability that another image is mixed in by half (Zhang et al. 2017)
    hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)  # largest change of hue (turns), saturation and value (0 to 1)
    flip: float = 0.0  # probability of a horizontal flip
    visible: float = 0.1  # a box of which a smaller share of the area is left is dropped
    least: float = 2.0  # and so is one with a side of fewer pixels
    sizes: tuple[int, ...] = ()  # multi-scale training: heights, each with the width of the same shape
    every: int = 10  # multi-scale training: steps between two sizes
    close: int = 0  # step from which mosaic, mixup, turns and scaling are off, as at the end of a run; 0: never

    def __post_init__(self) -> None:
        """Check that values are in range."""
        for name in ("mosaic", "mixup", "flip", "visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0 to 1, not {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale must be two ascending factors above 0, such as 0.5,1.5, not {self.scale}")
        least = min(self.degrees, self.shear, self.shift, self.least, self.close, *self.hsv, *self.sizes)
        if least < 0 or self.every < 1 or 0 in self.sizes or self.shear >= 90:
            raise ConfigError(
                "degrees, shear (below 90), shift, hsv, least and close must be at least 0, sizes and every at least 1"
            )

    @property
    def turns(self) -> bool:
        """Return whether images are rotated, sheared, scaled or shifted."""
        return bool(self.degrees or self.shear or self.shift) or self.scale != (1.0, 1.0)


def flips() -> Recipe:
    """Return Faster R-CNN's recipe: horizontal flips (Ren et al. 2015, section 3.3)."""
    return Recipe(flip=0.5)


def yolox(close: int = 0, *, sizes: tuple[int, ...] = (), small: bool = False) -> Recipe:
    """Return YOLOX's recipe (Ge et al. 2021, section 2.1, and the settings of its released code).

    Scaling and turning are about the centre of the mosaic, as in YOLOv5; YOLOX's code does it about the corner.

    Args:
        close: the step from which strong augmentation is off; in the paper 15 epochs before the end.
        sizes: heights for multi-scale training.
        small: the form for nano and tiny, without mixup and with scales from 0.5.
    """
    scale, mixup, mosaic = ((0.5, 1.5), 0.0, 0.5) if small else ((0.1, 2.0), 1.0, 1.0)
    hsv = (10 / 360, 30 / 255, 30 / 255)
    return Recipe(
        mosaic=mosaic, degrees=10.0, shear=2.0, scale=scale, shift=0.1, mixup=mixup, hsv=hsv, flip=0.5, sizes=sizes,
        close=close,
    )  # fmt: skip


class Piece(NamedTuple):
    """What one picture brought to a canvas."""

    objects: Objects
    moves: tuple[Move, ...]


class Canvas(NamedTuple):
    """An image under way."""

    image: np.ndarray  # uint8 [H, W, 3]
    pieces: tuple[Piece, ...]


def moved(canvas: Canvas, image: np.ndarray, move: Move) -> Canvas:
    """Return the canvas after a move of all its pixels, which gave `image`."""
    return Canvas(image, tuple(piece._replace(moves=(*piece.moves, move)) for piece in canvas.pieces))


def fitted(picture: Picture, move: Move, fill: int) -> Canvas:
    """Return a picture scaled and placed by a move along the axes (`geometry.letterbox`); the rest is `fill`."""
    image, objects = picture
    height, width = geometry.content(image.shape[:2], move)
    left, top = (round(float(shift)) for shift in move.matrix[:, 2])
    canvas = np.full((*move.size, 3), fill, np.uint8)
    _paste(canvas, resize(image, height, width), top, left)
    return Canvas(canvas, (Piece(objects, (move,)),))


def mosaic(pictures: Sequence[Picture], rng: np.random.Generator, size: Size, fill: int) -> Canvas:
    """Join four pictures around a random point of a canvas of twice the size; each is fitted into `size` before.

    The point is in the middle half of the canvas, and what passes the canvas's edges is cut.
    """
    whole = (2 * size[0], 2 * size[1])
    y, x = (int(rng.uniform(0.5 * side, 1.5 * side)) for side in size)
    canvas, pieces = np.full((*whole, 3), fill, np.uint8), list[Piece]()
    for number, (image, objects) in enumerate(pictures):
        fit = geometry.letterbox(image.shape[:2], size)
        height, width = geometry.content(image.shape[:2], fit)
        top, left = y - height if number < 2 else y, x - width if number % 2 == 0 else x
        _paste(canvas, resize(image, height, width), top, left)
        place = geometry.along_axes(whole, (fit.matrix[0, 0], fit.matrix[1, 1]), (left, top))
        pieces.append(Piece(objects, (place,)))
    return Canvas(canvas, tuple(pieces))


def turned(canvas: Canvas, rng: np.random.Generator, size: Size, recipe: Recipe, fill: int) -> Canvas:
    """Rotate, shear, scale and shift about the centre, and cut the image of `size` around it."""
    angle = math.radians(rng.uniform(-recipe.degrees, recipe.degrees))
    across, down = np.tan(np.radians(rng.uniform(-recipe.shear, recipe.shear, 2)))
    factor = rng.uniform(*recipe.scale)
    shift = rng.uniform(-recipe.shift, recipe.shift, 2) * (size[1], size[0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    image, move = augment.warp(
        canvas.image, factor * np.array([[1, across], [down, 1]]) @ turn, shift, fill=fill, size=size
    )
    return moved(canvas, image, move)


def mixed(canvas: Canvas, other: Picture, rng: np.random.Generator, fill: int) -> Canvas:
    """Mix in another picture by half: fitted, scaled by 0.5 to 1.5, perhaps flipped, at a random place.

    The objects of both count whole, as in YOLOX.
    """
    size = (canvas.image.shape[0], canvas.image.shape[1])
    image, objects = other
    fit = geometry.letterbox(image.shape[:2], size)
    factor, flip = rng.uniform(0.5, 1.5), rng.random() < 0.5
    height, width = (max(1, round(side * factor)) for side in geometry.content(image.shape[:2], fit))
    top, left = (
        int(rng.integers(min(0, room), max(0, room) + 1)) for room in (size[0] - height, size[1] - width)
    )  # a larger picture is cut, a smaller one framed
    scaled, moves = resize(image, height, width), [geometry.resize(image.shape[:2], (height, width))]
    if flip:
        scaled = scaled[:, ::-1]
        moves.append(geometry.mirror((height, width)))
    moves.append(geometry.along_axes(size, shift=(left, top)))
    layer = np.full((*size, 3), fill, np.uint8)
    _paste(layer, scaled, top, left)
    half = to_bytes((canvas.image.astype(np.float32) + layer) / 2)
    return Canvas(half, (*canvas.pieces, Piece(objects, tuple(moves))))


def recoloured(image: np.ndarray, rng: np.random.Generator, strength: Sequence[float]) -> np.ndarray:
    """Add to hue, saturation and value of uint8 [H, W, 3], each with probability 1/2.

    The change is uniform between minus and plus `strength`: of the hue in turns, of the others in shares of the range.
    """
    from PIL import Image

    amount = rng.uniform(-1, 1, 3) * strength * rng.integers(0, 2, 3)
    hue, *rest = np.rint(amount * (256, 255, 255)).astype(np.int16)
    values = np.asarray(Image.fromarray(image).convert("HSV")).astype(np.int16)
    values[..., 0] = (values[..., 0] + hue) % 256
    values[..., 1:] = np.clip(values[..., 1:] + np.array(rest), 0, 255)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(values.astype(np.uint8), 2, 0)]
    return np.asarray(Image.merge("HSV", bands).convert("RGB"))


def augmented(
    read: Callable[[int], Picture],
    index: int,
    count: int,
    rng: np.random.Generator,
    recipe: Recipe,
    fit: Callable[[Sequence[int]], Move],
    fill: int,
) -> Canvas:
    """Draw a training image.

    Args:
        read: returns a picture by its index, 0 to count - 1.
        index: of the picture to show.
        count: of all pictures, from which mosaic and mixup draw others.
        rng: makes every random choice.
        recipe: the augmentations.
        fit: (height, width) of a picture -> its move into the network's input.
        fill: grey level where no picture is, 0 to 255.
    """
    size = fit((1, 1)).size
    if recipe.mosaic and rng.random() < recipe.mosaic:
        others = rng.integers(0, count, 3).tolist()
        canvas = mosaic([read(number) for number in (index, *others)], rng, size, fill)
        canvas = turned(canvas, rng, size, recipe, fill)
    else:
        picture = read(index)
        canvas = fitted(picture, fit(picture[0].shape[:2]), fill)
        canvas = turned(canvas, rng, size, recipe, fill) if recipe.turns else canvas
    if recipe.mixup and rng.random() < recipe.mixup:
        canvas = mixed(canvas, read(int(rng.integers(count))), rng, fill)
    if any(recipe.hsv):
        canvas = canvas._replace(image=recoloured(canvas.image, rng, recipe.hsv))
    if recipe.flip:
        canvas = moved(canvas, *augment.flip(canvas.image, rng, recipe.flip))
    return canvas


def seen(canvas: Canvas, visible: float, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes, float64 [N, 4], and labels, int32 [N], of which enough is left to see on a canvas."""
    boxes, labels = [np.zeros((0, 4))], [np.zeros(0, np.int32)]
    for objects, moves in canvas.pieces:
        here, share = geometry.boxes(objects.boxes, moves)
        sides = (here[:, 2:] - here[:, :2]).min(axis=1, initial=np.inf)
        rows = (share > 0) & (share >= visible) & (sides >= least)
        boxes.append(here[rows])
        labels.append(objects.labels[rows])
    return np.concatenate(boxes), np.concatenate(labels)


def _paste(canvas: np.ndarray, image: np.ndarray, top: int, left: int) -> None:
    """Write an image into a canvas at a place, which may lie outside of it in part."""
    (height, width), (rows, columns) = image.shape[:2], canvas.shape[:2]
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, rows), min(left + width, columns)
    if y0 < y1 and x0 < x1:
        canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
