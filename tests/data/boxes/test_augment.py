"""Boxes follow pixels: a scene says which pixels belong to which object, and the same moves move that mask."""

from collections.abc import Callable

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.data.boxes import augment, scenes
from fm_jax.data.boxes.augment import Canvas, Recipe
from fm_jax.data.images import geometry
from fm_jax.data.images.augment import flip
from tests.close import close

SCENES = scenes.Scenes(scenes.Config(), "train")
SIZE = (48, 64)
STRONG = Recipe(degrees=20.0, shear=10.0, scale=(0.5, 1.6), shift=0.2)


def read(index: int) -> augment.Picture:
    return SCENES[index]


def fit(old: tuple[int, int]) -> geometry.Move:
    return geometry.letterbox(old, SIZE)


def draw(recipe: Recipe, seed: int) -> Canvas:
    return augment.augmented(read, seed, len(SCENES), np.random.default_rng(seed), recipe, fit, 114)


def pasted(pictures: list[int]) -> Callable[[np.random.Generator], Canvas]:
    return lambda rng: augment.mosaic([read(i) for i in pictures], rng, SIZE, 114)


MADE: dict[str, Callable[[np.random.Generator], Canvas]] = {
    "fitted": lambda rng: augment.fitted(read(0), fit((64, 64)), 114),
    "mosaic": pasted([0, 1, 2, 3]),
    "mosaic turned": lambda rng: augment.turned(pasted([0, 1, 2, 3])(rng), rng, SIZE, STRONG, 114),
    "turned": lambda rng: augment.turned(augment.fitted(read(0), fit((64, 64)), 114), rng, SIZE, STRONG, 114),
}


@pytest.mark.parametrize("form", MADE)
@pytest.mark.parametrize("seed", range(5))
def test_boxes_contain_the_pixels_of_their_objects(form: str, seed: int) -> None:
    canvas = MADE[form](np.random.default_rng(seed))
    mirrored, move = flip(canvas.image, np.random.default_rng(0), 1.0)
    for shown in (canvas, augment.moved(canvas, mirrored, move)):
        seen = 0
        for number, piece in enumerate(shown.pieces):
            owner = geometry.mask(SCENES.scene(number).owner, piece.moves)
            boxes, share = geometry.boxes(piece.objects.boxes, piece.moves)
            for i, (left, top, right, bottom) in enumerate(boxes):
                rows, columns = np.nonzero(owner == i + 1)
                seen += len(rows)
                if share[i] == 0:
                    assert not len(rows)
                    continue
                assert (columns + 0.5 >= left).all() and (columns + 0.5 <= right).all()
                assert (rows + 0.5 >= top).all() and (rows + 0.5 <= bottom).all()
        assert seen > 20


@pytest.mark.parametrize("form", ["fitted", "mosaic"])
def test_the_pixels_of_a_box_are_those_of_the_object(form: str) -> None:
    """Where nothing is turned, the pixels inside a moved box are the old box's, resized."""
    side = (64, 64)  # scenes of this size are pasted pixel by pixel
    pictures = [read(i) for i in range(4)]
    made = augment.fitted(pictures[0], geometry.letterbox(side, side), 114)
    if form == "mosaic":
        made = augment.mosaic(pictures, np.random.default_rng(3), side, 114)
    for (image, objects), piece in zip(pictures, made.pieces, strict=False):
        boxes, share = geometry.boxes(objects.boxes, piece.moves)
        for old, new, whole in zip(objects.boxes.astype(int), boxes.astype(int), share, strict=True):
            if whole == 1:
                one, two = image[old[1] : old[3], old[0] : old[2]], made.image[new[1] : new[3], new[0] : new[2]]
                np.testing.assert_array_equal(one, two)


def test_a_flip_and_another_change_nothing() -> None:
    canvas = augment.fitted(read(2), fit((64, 64)), 114)
    twice = canvas
    for _ in range(2):
        twice = augment.moved(twice, *flip(twice.image, np.random.default_rng(0), 1.0))
    np.testing.assert_array_equal(twice.image, canvas.image)
    np.testing.assert_array_equal(augment.seen(twice, 0.0, 0.0)[0], augment.seen(canvas, 0.0, 0.0)[0])
    once = augment.moved(canvas, *flip(canvas.image, np.random.default_rng(0), 1.0))
    left, top, right, bottom = augment.seen(canvas, 0.0, 0.0)[0].T
    close(augment.seen(once, 0.0, 0.0)[0], np.stack([64 - right, top, 64 - left, bottom], 1), 1e-12)


def test_a_box_is_kept_by_its_visible_share_and_then_clipped() -> None:
    image, objects = read(0)
    one = objects._replace(boxes=np.array([[10.0, 10, 30, 30]], np.float32), labels=np.array([1], np.int32))
    for shift, left in ((-25.0, 0.25), (-29.0, 0.05)):
        canvas = augment.fitted((image, one), geometry.letterbox((64, 64), (64, 64)), 114)
        canvas = augment.moved(canvas, canvas.image, geometry.along_axes((64, 64), shift=(shift, 0)))
        boxes, labels = augment.seen(canvas, 0.2, 0.0)
        assert labels.tolist() == ([1] if left > 0.2 else [])
        assert boxes.tolist() == ([[0, 10, 5, 30]] if left > 0.2 else [])
        assert len(augment.seen(canvas, 0.2, 6.0)[1]) == 0  # too narrow
        assert len(augment.seen(canvas, 0.0, 0.0)[1]) == 1


def test_mixing_shows_both_pictures_by_half_with_the_boxes_of_both() -> None:
    canvas = augment.fitted(read(0), fit((64, 64)), 114)
    for seed in range(6):
        mixed = augment.mixed(canvas, read(1), np.random.default_rng(seed), 114)
        assert len(mixed.pieces) == 2 and mixed.image.shape == canvas.image.shape
        layer = 2.0 * mixed.image - canvas.image
        owner = geometry.mask(SCENES.scene(1).owner, mixed.pieces[1].moves)
        shown = geometry.mask(read(1)[0], mixed.pieces[1].moves)
        inner = owner > 0
        if inner.sum() > 30:  # the other picture's object is where its mask went
            assert np.median(np.abs(layer[inner] - shown[inner])) <= 12


def test_letterboxing_is_undone_exactly_and_scales_each_side_by_its_own_ratio() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        old, new = rng.integers(20, 900, 2), rng.integers(32, 640, 2)
        corners = np.sort(rng.uniform(0, 1, (7, 2, 2)), axis=1).reshape(7, 4) * np.tile(old[::-1], 2)
        for move in (geometry.letterbox(old, new), geometry.short_side(old, new, 200, 333)):
            boxes, share = geometry.boxes(corners, (move,))
            close(share, np.ones(7), 1e-9)
            close(geometry.restore(boxes, (move,), old), corners, 1e-9)
            height, width = geometry.content(old, move)
            whole, _ = geometry.boxes(np.array([[0.0, 0, old[1], old[0]]]), (move,))
            close(whole, np.array([[0.0, 0, width, height]]), 1e-9)
            assert height <= new[0] and width <= new[1]
    assert geometry.content((480, 640), geometry.letterbox((480, 640), (416, 416))) == (312, 416)
    assert geometry.content((480, 640), geometry.short_side((480, 640), (1344, 1344), 800, 1333)) == (800, 1067)
    assert geometry.content((400, 1000), geometry.short_side((400, 1000), (1344, 1344), 800, 1333)) == (533, 1333)
    outside = geometry.restore(np.array([[-5.0, -5, 900, 900]]), (geometry.letterbox((10, 20), (64, 64)),), (10, 20))
    assert outside.tolist() == [[0, 0, 20, 10]]


def test_colours_change_and_shapes_stay() -> None:
    image = read(0)[0]
    assert augment.recoloured(image, np.random.default_rng(0), (0.0, 0.0, 0.0)).shape == image.shape
    grey = np.full((4, 4, 3), 90, np.uint8)
    for seed in range(8):
        changed = augment.recoloured(grey, np.random.default_rng(seed), (0.5, 0.0, 0.2))
        assert (changed == changed[0, 0]).all() and len(set(changed[0, 0].tolist())) == 1  # grey has no hue
        assert abs(int(changed[0, 0, 0]) - 90) <= 51
    seen = {augment.recoloured(image, np.random.default_rng(seed), (0.02, 0.1, 0.1)).tobytes() for seed in range(20)}
    assert len(seen) > 10


def test_a_draw_depends_on_its_generator_only() -> None:
    recipe = augment.yolox()
    one, two = draw(recipe, 3), draw(recipe, 3)
    assert one.image.shape == (*SIZE, 3) and len(one.pieces) == 5
    np.testing.assert_array_equal(one.image, two.image)
    assert not np.array_equal(one.image, draw(recipe, 4).image)
    plain = draw(Recipe(), 3)
    np.testing.assert_array_equal(plain.image, augment.fitted(read(3), fit((64, 64)), 114).image)
    assert any(len(draw(augment.yolox(small=True), seed).pieces) == 1 for seed in range(8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mosaic": 1.5}, r"mosaic must be in 0 to 1, not 1\.5"),
        ({"scale": (2.0, 1.0)}, "scale must be two ascending factors"),
        ({"shear": 90.0}, "shear"),
        ({"sizes": (0,)}, "sizes and every at least 1"),
        ({"close": -1}, "close must be at least 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**wrong)  # type: ignore[arg-type]
