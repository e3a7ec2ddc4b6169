"""Grids by what is on their axes."""

from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.report import grids

RED, BLUE = (np.full((4, 6, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


def placed(axes):
    """(column, row) -> image."""
    found = {}
    for image in axes.images:
        left, _, _, top = image.get_extent()
        found[int(left), int(top)] = np.asarray(image.get_array())
    return found


def test_images_stand_in_rows_with_names_heads_and_frames(tmp_path: Path, drawn) -> None:
    png = tmp_path / "new" / "grid.png"
    grids.image_grid(png, [[RED, BLUE], [BLUE]], names=["a", "b"], heads=["x", "y"], marks=[[True, False], [None]])
    (axes,) = drawn
    found = placed(axes)
    assert (
        set(found) == {(0, 0), (1, 0), (0, 1)}
        and np.array_equal(found[1, 0], BLUE)
        and np.array_equal(found[0, 0], RED)
    )
    assert [t.get_text() for t in axes.get_xticklabels()] == ["x", "y"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert [line.get_color() for line in axes.lines] == [grids._RIGHT, grids._WRONG]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_neighbours_stand_beside_their_query_nearest_first(tmp_path: Path, drawn) -> None:
    known = [RED, BLUE, RED // 2]
    features = np.array([[1.0, 0.1]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    grids.neighbours(tmp_path / "n.png", [BLUE], known, features, (np.array([1]), np.array([1, 0, 0])), k=2)
    (axes,) = drawn
    found = placed(axes)
    assert (
        np.array_equal(found[0, 0], BLUE) and np.array_equal(found[1, 0], RED) and np.array_equal(found[2, 0], RED // 2)
    )
    assert [line.get_color() for line in axes.lines] == [grids._RIGHT, grids._WRONG]
    assert axes.get_xticklabels()[0].get_text() == "query"


def test_reconstructions_stand_beside_their_originals(tmp_path: Path, drawn) -> None:
    grids.reconstructions(tmp_path / "r.png", {"original": [RED, BLUE], "model": [RED // 2, BLUE // 2]})
    found = placed(drawn[0])
    assert np.array_equal(found[1, 1], BLUE // 2) and np.array_equal(found[0, 1], BLUE)
    with pytest.raises(DataError, match="equally many images"):
        grids.reconstructions(tmp_path / "r.png", {"a": [RED], "b": []})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no images to draw"),
        ([[RED[..., 0]]], {}, "row 0: an image must be uint8"),
        ([[RED / 255]], {}, "not float64"),
        ([[RED]], {"heads": ["a", "b"]}, "not 0 and 2"),
        ([[RED]], {"marks": [[]]}, "one entry per image"),
    ],
)
def test_what_is_no_grid_is_refused(rows, options, message, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        grids.image_grid(tmp_path / "x.png", rows, **options)
    assert not list(tmp_path.iterdir())
