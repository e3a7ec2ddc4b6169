"""Boxes by the pixels that they paint, curves by what is on their axes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fm_jax.core.errors import DataError
from fm_jax.evals.report import boxes, theme

GREY = np.full((64, 64, 3), 128, np.uint8)
ONE, ZERO = np.array([[8.0, 24, 40, 56]]), np.zeros(1, int)


def test_a_small_image_is_enlarged_and_its_box_is_painted_in_the_colour_of_its_class() -> None:
    image = boxes.draw(GREY, ONE, ZERO + 2, ["a", "b", "c"], np.array([0.87]))
    assert image.shape == (448, 448, 3)  # 7 times
    for row, column in ((24 * 7, 8 * 7 + 100), (56 * 7 - 1, 60), (300, 8 * 7), (300, 40 * 7 - 1)):
        assert tuple(image[row, column]) == boxes.colour(2)
    for row, column in ((24 * 7 + 10, 8 * 7 + 10), (56 * 7, 60), (300, 8 * 7 - 1), (300, 40 * 7)):
        assert tuple(image[row, column]) == (128, 128, 128)
    tag = image[24 * 7 - 8 : 24 * 7, 8 * 7 : 8 * 7 + 40]
    assert (tag == boxes.colour(2)).all(axis=-1).any() and (tag == 255).all(axis=-1).any()  # white text on its colour


def test_a_photograph_keeps_its_size_and_a_box_beyond_the_edge_keeps_its_name_in_sight() -> None:
    photograph = np.zeros((450, 600, 3), np.uint8)
    image = boxes.draw(photograph, np.array([[-20.0, -30, 700, 460]]), ZERO, ["quokka"], np.ones(1))
    assert image.shape == photograph.shape and (image[:20, :60] == boxes.colour(0)).all(axis=-1).sum() > 100
    np.testing.assert_array_equal(boxes.draw(photograph, np.zeros((0, 4)), np.zeros(0, int), []), photograph)


def test_the_best_detection_is_on_top() -> None:
    both = np.repeat(ONE, 2, axis=0)
    for scores, top in (([0.9, 0.2], 0), ([0.2, 0.9], 1)):
        image = boxes.draw(GREY, both, np.array([0, 1]), ["x", "x"], np.array(scores))
        assert tuple(image[300, 8 * 7]) == boxes.colour(top)


def test_colours_of_eighty_classes_differ() -> None:
    assert len({boxes.colour(label) for label in range(80)}) == 80


def test_what_cannot_be_drawn_is_refused() -> None:
    for image, box, label, said in (
        (GREY.astype(float), ONE, ZERO, "must be uint8"),
        (GREY, ONE[:, :3], ZERO, "do not fit together"),
        (GREY, ONE, ZERO + 1, "labels 1 to 1 have no names: there are 1 classes"),
    ):
        with pytest.raises(DataError, match=said):
            boxes.draw(image, box, label, ["a"])


def test_a_sheet_places_images_of_any_size_and_is_written(tmp_path: Path) -> None:
    wide, high = np.full((10, 50, 3), 1, np.uint8), np.full((30, 20, 3), 2, np.uint8)
    page = boxes.sheet([[wide, high], [high]])
    assert page.shape == (12 + 30 + 12 + 30 + 12, 12 + 50 + 12 + 50 + 12, 3)
    assert (page == 1).all(axis=-1).sum() == 500 and (page == 2).all(axis=-1).sum() == 1200
    boxes.save(tmp_path / "new" / "sheet.png", page)
    with Image.open(tmp_path / "new" / "sheet.png") as written:
        np.testing.assert_array_equal(np.asarray(written), page)
    assert boxes.sheet([[wide]], ["truth"]).min() < 100  # a heading
    with pytest.raises(DataError, match="0 columns"):
        boxes.sheet([])


def test_curves_carry_their_ap_and_many_classes_only_their_mean(tmp_path: Path, drawn) -> None:
    recalls = np.linspace(0, 1, 11)
    boxes.precision_recall(tmp_path / "a.png", recalls, {"cat": np.full(11, 0.5), "dog": np.full(11, 1.0)})
    boxes.precision_recall(tmp_path / "b.png", recalls, {str(i): np.full(11, 0.25) for i in range(8)})
    few, many = drawn
    assert [line.get_label() for line in few.lines] == ["cat 0.50", "dog 1.00", "mean of 2 0.75"]
    assert [line.get_color() for line in few.lines[:2]] == list(theme.COLORS[:2])
    assert len(many.lines) == 9 and many.lines[-1].get_label() == "mean of 8 0.25"
    for curves, said in (({}, "no class has an object"), ({"cat": np.full(11, -1.0)}, "in 0 to 1")):
        with pytest.raises(DataError, match=said):
            boxes.precision_recall(tmp_path / "c.png", recalls, curves)
