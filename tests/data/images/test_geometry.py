"""Moves say where pixels went: a spot of light, a painted rectangle and a mask, through every operation and recipe."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.images import augment, geometry, views
from fm_jax.data.images.geometry import Move, Moved
from fm_jax.data.images.rand_augment import OPERATIONS, rand_augment
from fm_jax.data.images.views import Recipe
from tests.close import close

H, W = 60, 84
CORNERS = np.array([[0.0, 0.0], [W, 0.0], [W, H], [0.0, H]])


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def centroid(image: np.ndarray) -> np.ndarray:
    """Return the centre (x, y) of the light in an image, between pixels."""
    light = image[..., 0].astype(float)
    rows, columns = np.indices(light.shape) + 0.5
    return np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum()


Operation = Callable[[np.ndarray, int], Moved]
OPERATION: dict[str, Operation] = {
    "mirror": lambda image, seed: augment.flip(image, rng(seed), 1.0),
    "no mirror": lambda image, seed: augment.flip(image, rng(seed), 0.0),
    "resize": lambda image, seed: augment.resized(image, 37 + seed, 101 - seed),
    "resize a box": lambda image, seed: augment.resized(image, 40, 50, box=(4.5, 3.25, 70.0, 55.5)),
    "centre": lambda image, seed: augment.centre(image, 50 + seed),
    "inner centre": lambda image, seed: augment.centre(image, 31, 0.85),
    "stretched centre": lambda image, seed: augment.centre(image, 41, 0.9, stretch=True),
    "crop": lambda image, seed: augment.random_resized_crop(image, rng(seed), 48, area=(0.6, 1.0)),
    "pad": lambda image, seed: augment.pad_crop(image, rng(seed), 7),
    "affine": lambda image, seed: augment.affine(image, rng(seed)),
    "warp": lambda image, seed: augment.warp(image, np.array([[1.1, 0.3], [-0.2, 0.9]]), np.array([3.5, -2.25])),
} | {
    name: lambda image, seed, operation=operation: operation(image, 0.4, 1 if seed % 2 else -1)
    for name, operation in OPERATIONS.items()
    if name.startswith(("rotate", "shear", "translate"))
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATION)
def test_a_spot_is_where_the_move_says(name: str) -> None:
    found = 0
    for seed in range(8):
        for row, column in ((20, 30), (35, 50), (30, 42)):
            image = np.zeros((H, W, 3), np.uint8)
            image[row : row + 6, column : column + 6] = 255
            moved, move = OPERATION[name](image, seed)
            assert move.size == moved.shape[:2] and move.matrix.dtype == np.float64 and move.matrix.shape == (2, 3)
            frame, _ = geometry.points(np.array([[column, row], [column + 6.0, row + 6.0]]), [move])
            height, width = move.size
            if (frame.min(0) < 4).any() or (frame.max(0) > (width - 4, height - 4)).any():
                continue  # part of the spot may be cut off
            (there,), (seen,) = geometry.points(np.array([[column + 3.0, row + 3.0]]), [move])
            assert np.abs(centroid(moved) - there).max() < 0.1
            assert seen
            found += 1
    assert found >= 5


RECIPES = {
    "centre": Recipe(),
    "crop": Recipe(geometry="crop", area=(0.3, 1.0), flip=0.5),
    "pad": views.cifar(),
    "affine": Recipe(geometry="affine", flip=0.5),
    "strong": Recipe(geometry="affine", affine=2.0, flip=0.5),
}


def turned(image: np.ndarray, seed: int, recipe: Recipe, size: int) -> tuple[np.ndarray, tuple[Move, ...]]:
    """Return a view, and after it RandAugment's rotation and shear, which turn what was turned."""
    random = rng(seed)
    shown, moves = views.view(image, random, size, recipe)
    for name in ("rotate", "shear_x")[: seed % 3]:
        shown, move = OPERATIONS[name](shown, 0.5, 1)
        moves += (move,)
    return shown, moves


@pytest.mark.parametrize("name", RECIPES)
def test_a_painted_rectangle_fills_its_box(name: str) -> None:
    """Through several moves the box is that of what is left, not a box around boxes."""
    seen = 0
    for seed in range(40):
        left, top = 4 + seed, 5 + seed % 17
        image = np.zeros((H, W, 3), np.uint8)
        image[top : top + 30, left : left + 34] = 255
        shown, moves = turned(image, seed, RECIPES[name], 48)
        (box,), (share,) = geometry.boxes(np.array([[left, top, left + 34.0, top + 30.0]]), moves)
        light = shown[..., 0] > 127
        area = abs(np.linalg.det(geometry.compose(moves)[:, :2])) * 34 * 30
        assert abs(light.sum() - share * area) < 0.03 * area + 8
        if share < 0.05:
            continue
        rows, columns = np.flatnonzero(light.any(1)), np.flatnonzero(light.any(0))
        painted = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
        assert np.abs(box - painted).max() <= (2 if name == "strong" else 1)  # the tip of a turned corner is faint
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("name", RECIPES)
def test_a_mask_follows_the_pixels(name: str) -> None:
    """Also where one move cuts off what a later one would bring back: the image has only a border there."""
    yes = np.zeros((H, W), np.uint8)
    yes[8:40, 3:50] = 1
    yes[20:30, 60:] = 1
    for seed in range(20):
        shown, moves = turned(np.repeat(255 * yes[..., None], 3, axis=2), seed, RECIPES[name], 48)
        mask = geometry.mask(yes, moves)
        assert mask.shape == shown.shape[:2] and mask.dtype == yes.dtype
        agree = mask == (shown[..., 0] > 127)
        assert agree.mean() > 0.97
    both = geometry.mask(np.stack([yes, 1 - yes], axis=2), moves, fill=9)
    assert np.array_equal(both[..., 0] == 9, both[..., 1] == 9) and np.array_equal(mask == 1, both[..., 0] == 1)


def test_moves_compose_in_order_and_points_are_lost_where_an_image_ends() -> None:
    image = np.zeros((H, W, 3), np.uint8)
    moves: list[Move] = []
    for name in ("centre", "affine", "mirror", "resize"):
        image, move = OPERATION[name](image, 3)
        moves.append(move)
    places = np.array([[42.0, 30.0], [1.0, 30.0]])
    found, seen = geometry.points(places, moves)
    close(found, places @ geometry.compose(moves)[:, :2].T + geometry.compose(moves)[:, 2])
    assert seen.tolist() == [True, False]  # the centre crop cuts off the left
    assert np.array_equal(geometry.compose([]), np.eye(3)[:2])
    back, _ = geometry.points(geometry.points(CORNERS, [geometry.mirror((H, W))])[0], [geometry.mirror((H, W))])
    assert np.array_equal(back, CORNERS)


def test_mirrored_boxes_are_exact_and_a_box_outside_is_gone() -> None:
    boxes = np.array([[2.0, 3, 10, 20], [-4, -6, 4, 6], [70, 50, 100, 90], [90, 5, 99, 9], [5, 5, 5, 9]])
    found, share = geometry.boxes(boxes, [geometry.mirror((H, W))])
    assert found.tolist() == [[74, 3, 82, 20], [80, 0, 84, 6], [0, 50, 14, 60], [0, 0, 0, 0], [79, 5, 79, 9]]
    close(share, np.array([1, 1 / 4, 14 * 10 / (30 * 40), 0, 0]))
    assert geometry.boxes(np.zeros((0, 4)), [geometry.mirror((H, W))])[0].shape == (0, 4)


def test_a_quarter_turn_of_a_box_is_a_box() -> None:
    _, move = augment.warp(np.zeros((40, 40, 3), np.uint8), np.array([[0.0, -1.0], [1.0, 0.0]]), np.zeros(2))
    found, share = geometry.boxes(np.array([[4.0, 6, 14, 12]]), [move])
    close(found, np.array([[28, 4, 34, 14]]))
    close(share, np.array([1]))


def test_rand_augment_returns_the_moves_of_its_operations() -> None:
    image = np.zeros((H, W, 3), np.uint8)
    image[27:33, 39:45] = 255
    for seed in range(30):
        shown, moves = rand_augment(image, rng(seed), 3, 3.0)
        assert len(moves) == 3
        (there,), _ = geometry.points(np.array([[42.0, 30.0]]), moves)
        bright = shown[..., 0].astype(int) - shown[..., 0].min()  # solarize and equalize keep the darkest
        if (bright > 200).sum() not in range(20, 60):
            continue  # inverted
        assert np.abs(centroid(np.where(bright > 128, 255, 0)[..., None]) - there).max() < 1


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((2, 3)), np.array([[0, 0, np.nan, 1]])])
def test_what_is_no_box_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"boxes must be finite numbers \[N, 4\], not \["):
        geometry.boxes(wrong, [])


def test_a_second_view_has_its_own_moves() -> None:
    recipe = replace(views.simclr(), small=2, small_size=16)
    large, little = views.multi_crop(np.zeros((H, W, 3), np.uint8), rng(0), 32, recipe)
    assert [view.moves[-1].size for view in (*large, *little)] == [(32, 32)] * 2 + [(16, 16)] * 2
    assert len({view.moves[0].matrix.tobytes() for view in (*large, *little)}) == 4
