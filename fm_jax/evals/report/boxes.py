"""Pictures of detections: boxes drawn on images, and precision-recall curves.

Boxes are drawn with Pillow on enlarged pixels, so a photograph keeps its size and a picture of 64 pixels can be read.
"""

import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.core.workdir import write_atomically
from fm_jax.evals.report import theme

_READABLE = 448  # pixels: a smaller image is enlarged by a whole number to at least this
_GAP = 12  # pixels between images on a sheet
_MOST_CURVES = len(theme.COLORS)

Colour = tuple[int, int, int]


def colour(label: int) -> Colour:
    """Return a class's colour: the theme's, then hues a golden angle apart."""
    if label < len(theme.COLORS):
        red, green, blue = (int(theme.COLORS[label][i : i + 2], 16) for i in (1, 3, 5))
        return red, green, blue
    shades = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, (0.95, 0.7)[label % 2])
    red, green, blue = (round(255 * shade) for shade in shades)
    return red, green, blue


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Return an image with its boxes, each with its class and score; the best are on top.

    Args:
        image: uint8 [H, W, 3]; a small one is enlarged by a whole number, without smoothing.
        boxes: [K, 4]: left, top, right, bottom in pixels of the image.
        labels: integers [K].
        names: names of all classes.
        scores: [K], in 0 to 1; None: boxes of the truth, without numbers.

    Raises:
        DataError: not an image, not as many labels and scores as boxes, or a label without a name.
    """
    from PIL import Image, ImageDraw, ImageFont

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"an image must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
    if boxes.shape != (len(labels), 4) or (scores is not None and len(scores) != len(labels)):
        raise DataError(f"boxes {boxes.shape}, {len(labels)} labels and scores do not fit together")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise DataError(f"labels {labels.min()} to {labels.max()} have no names: there are {len(names)} classes")
    height, width = image.shape[:2]
    scale = max(1, math.ceil(_READABLE / max(height, width)))
    picture = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    pen, line = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 250))
    font = ImageFont.load_default(size=max(12, round(max(picture.size) / 36)))
    for k in np.argsort(np.zeros(len(labels)) if scores is None else scores, kind="stable"):
        paint, text = colour(int(labels[k])), names[int(labels[k])]
        text += "" if scores is None else f" {scores[k]:.2f}"
        left, top, right, bottom = (float(side) * scale for side in boxes[k])
        right, bottom = max(right - 1, left), max(bottom - 1, top)  # edges to the last pixels
        pen.rectangle((left, top, right, bottom), outline=paint, width=line)
        sides = pen.textbbox((0, 0), text, font=font)
        wide, high = sides[2] + 6, sides[3] + 4
        x = min(max(left, 0), max(picture.width - wide, 0))
        y = top - high if top >= high else max(min(top, picture.height - high), 0)  # inside where above is no room
        pen.rectangle((x, y, x + wide, y + high), fill=paint)
        light = 0.299 * paint[0] + 0.587 * paint[1] + 0.114 * paint[2] > 140
        pen.text((x + 3, y + 1), text, fill="black" if light else "white", font=font)
    return np.asarray(picture)


def sheet(rows: Sequence[Sequence[np.ndarray]], heads: Sequence[str] = ()) -> np.ndarray:
    """Return images uint8 [H, W, 3] in rows on white, with headings over the columns; a shorter row ends with a gap.

    Raises:
        DataError: no images, or more headings than columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = max((len(row) for row in rows), default=0)
    if not columns or len(heads) > columns:
        raise DataError(f"a sheet of {columns} columns cannot be drawn with {len(heads)} headings")
    wide = max(image.shape[1] for row in rows for image in row) + _GAP
    size = max(14, wide // 24)
    above = 2 * size if heads else _GAP
    highs = [max((image.shape[0] for image in row), default=0) + _GAP for row in rows]
    page = Image.new("RGB", (columns * wide + _GAP, sum(highs) + above), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=size)
    for x, head in enumerate(heads):
        pen.text((x * wide + _GAP, size // 3), head, fill=theme.INK, font=font)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(Image.fromarray(image), (x * wide + _GAP, sum(highs[:y]) + above))
    return np.asarray(page)


def save(png: Path, image: np.ndarray) -> None:
    """Write an image uint8 [H, W, 3] as PNG, replacing the file atomically."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(image).save(held, format="PNG", optimize=True)
    png.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(png, held.getvalue())


def precision_recall(png: Path, recalls: np.ndarray, curves: Mapping[str, np.ndarray], *, title: str = "") -> None:
    """Draw {class: precision [R]} over recalls [R], each with its AP, and their mean where there are several.

    Of more than seven classes, the mean is named and the classes are pale.

    Raises:
        DataError: no curves, or one of another length or outside 0 to 1.
        ConfigError: matplotlib is missing.
    """
    if not curves:
        raise DataError("there are no curves to draw: no class has an object")
    for name, values in curves.items():
        if values.shape != recalls.shape or not (values.min() >= 0 and values.max() <= 1):
            raise DataError(f"the precision of {name!r} must be {len(recalls)} values in 0 to 1, not {values}")
    mean, many = np.mean(list(curves.values()), axis=0), len(curves) > _MOST_CURVES
    with theme.picture(png, 5.6, 4.6) as axes:
        for i, (name, values) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": theme.GREY, "alpha": 0.35, "linewidth": 0.8}
            if not many:
                label = f"{name} {values.mean():.2f}"
                dash = theme.DASHES[i % len(theme.DASHES)]
                style = {"color": theme.COLORS[i], "linestyle": dash, "linewidth": 1.5, "label": label}
            axes.plot(recalls, values, **style)
        if len(curves) > 1:
            axes.plot(recalls, mean, color=theme.INK, linewidth=2.8, label=f"mean of {len(curves)} {mean.mean():.2f}")
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
        axes.grid()
        axes.set_title(title)
        axes.figure.legend(loc="outside lower center", ncols=3, title="AP")
