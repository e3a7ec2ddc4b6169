"""Grids of images: nearest neighbours of queries, originals beside reconstructions, samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.evals.features.neighbours import nearest
from fm_jax.evals.report import theme

_RIGHT, _WRONG = theme.COLORS[2], theme.COLORS[1]


def image_grid(
    png: Path,
    rows: Sequence[Sequence[np.ndarray]],
    *,
    names: Sequence[str] = (),
    heads: Sequence[str] = (),
    marks: Sequence[Sequence[bool | None]] = (),
    title: str = "",
) -> None:
    """Draw images in rows at one size, without smoothing small ones.

    Args:
        png: the file to write.
        rows: rows of images uint8 [H, W, 3]; a shorter row ends with a gap.
        names: labels of the rows, on the left.
        heads: headings of the columns.
        marks: a frame for each image: True is green, False red, None no frame.
        title: the figure's title.

    Raises:
        DataError: no images, arrays of another shape or type, or a wrong number of names, heads or marks.
        ConfigError: matplotlib is missing.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise DataError("there are no images to draw")
    for number, row in enumerate(rows):
        for image in row:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise DataError(f"row {number}: an image must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
    if (names and len(names) != len(rows)) or (heads and len(heads) != columns):
        raise DataError(
            f"{len(rows)} rows and {columns} columns need as many names and heads, not {len(names)} and {len(heads)}"
        )
    if marks and [len(row) for row in marks] != [len(row) for row in rows]:
        raise DataError("marks must have one entry per image of each row")
    with theme.picture(png, max(2.5, 0.95 * columns + 1.0), max(1.5, 0.95 * len(rows) + 0.6)) as axes:
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                axes.imshow(image, extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04), interpolation="nearest")
                mark = marks[y][x] if marks else None
                if mark is not None:
                    color = _RIGHT if mark else _WRONG
                    axes.plot(
                        [x + 0.04, x + 0.96, x + 0.96, x + 0.04, x + 0.04],
                        [y + 0.04, y + 0.04, y + 0.96, y + 0.96, y + 0.04],
                        color=color,
                        linewidth=2.2,
                    )
        axes.set(xlim=(0, columns), ylim=(len(rows), 0), aspect="equal")
        axes.set_xticks([i + 0.5 for i in range(len(heads))], heads)
        axes.set_yticks([i + 0.5 for i in range(len(names))], names)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(title)


def neighbours(
    png: Path,
    queries: Sequence[np.ndarray],
    known: Sequence[np.ndarray],
    features: tuple[np.ndarray, np.ndarray],
    labels: tuple[np.ndarray, np.ndarray],
    *,
    k: int = 8,
    title: str = "",
) -> None:
    """Draw each query with its k nearest known images; the frame is green if the class is the query's, else red.

    Args:
        png: the file to write.
        queries: Q images, uint8 [H, W, 3].
        known: N images, uint8 [H, W, 3]; only the nearest are read.
        features: features of the queries [Q, D] and of the known images [N, D].
        labels: labels of the queries [Q] and of the known images [N].
        k: neighbours per query.
        title: the figure's title.

    Raises:
        DataError: as `image_grid` and `nearest`.
    """
    rows, cosines = nearest(features[1], features[0], k)
    images = [[query, *(known[int(i)] for i in near)] for query, near in zip(queries, rows, strict=True)]
    marks = [[None, *(bool(labels[1][i] == own) for i in near)] for own, near in zip(labels[0], rows, strict=True)]
    heads = ["query", *(f"{mean:.2f}" for mean in cosines.mean(axis=0))]
    image_grid(png, images, heads=heads, marks=marks, title=title)


def reconstructions(
    png: Path, columns: dict[str, Sequence[np.ndarray]], *, names: Sequence[str] = (), title: str = ""
) -> None:
    """Draw {heading: images uint8 [H, W, 3]}, such as original, masked, reconstructed; one example per row.

    Raises:
        DataError: as `image_grid`, or columns of different lengths.
    """
    if len({len(images) for images in columns.values()}) != 1:
        raise DataError(f"columns must have equally many images, not { ({k: len(v) for k, v in columns.items()}) }")
    rows = list(zip(*columns.values(), strict=True))
    image_grid(png, rows, names=names, heads=list(columns), title=title)
