import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import augment
from fm_jax.data.images.rand_augment import OPERATIONS, rand_augment
from tests.close import close

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)
PLACES = np.stack([*np.meshgrid(np.arange(36), np.arange(24)), np.zeros((24, 36))], -1).astype(np.uint8)  # (x, y, 0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(operation: Callable[..., Any], *arguments: Any, **more: Any) -> np.ndarray:
    """Return the image of an operation that also returns its move; `test_geometry.py` tests the moves."""
    image: np.ndarray = operation(*arguments, **more)[0]
    return image


def test_a_flip_twice_is_no_flip() -> None:
    once = picture(augment.flip, IMAGE, rng(), 1.0)
    assert np.array_equal(once, IMAGE[:, ::-1]) and np.array_equal(picture(augment.flip, once, rng(), 1.0), IMAGE)
    assert np.array_equal(picture(augment.flip, IMAGE, rng(), 0.0), IMAGE)
    flipped = sum(picture(augment.flip, IMAGE, rng(seed), 0.25)[0, 0, 0] == IMAGE[0, -1, 0] for seed in range(400))
    assert 70 < flipped < 130


def test_the_middle_is_the_middle() -> None:
    assert np.array_equal(picture(augment.centre, PLACES, 24), PLACES[:, 6:30])
    big = np.repeat(np.repeat(PLACES, 10, 0), 10, 1)
    found = picture(augment.centre, big, 21, 0.875)  # shorter side to 24, then 21 of it
    assert found.shape == (21, 21, 3)
    # 3 and 15 are cut off, 1 and 7 in front
    assert np.abs(found[..., 0].astype(int) - PLACES[1:22, 7:28, 0]).max() <= 1
    assert picture(augment.centre, IMAGE, 50).shape == (50, 50, 3)
    wide = np.repeat(PLACES[:, :24], 3, 1)  # three times as wide: stretched back to a square
    found = picture(augment.centre, wide, 20, 20 / 24, stretch=True)
    assert np.abs(found.astype(int) - PLACES[2:22, 2:22]).max() <= 1


def test_a_random_crop_lies_inside_and_has_the_area_and_ratio_it_should() -> None:
    ramp = np.stack([*np.meshgrid(np.arange(200), np.arange(150)), np.zeros((150, 200))], -1).astype(np.uint8)
    areas, ratios, starts = [], [], []
    for seed in range(300):
        found = picture(augment.random_resized_crop, ramp, rng(seed), 64, area=(0.1, 0.5)).astype(float)
        width = (found[:, -1, 0] - found[:, 0, 0]).mean() * 64 / 63
        height = (found[-1, :, 1] - found[0, :, 1]).mean() * 64 / 63
        areas.append(width * height / (200 * 150))
        ratios.append(np.log(width / height))
        starts.append(found[0, 0, :2])
        assert found[..., 0].max() < 200 and found[..., 1].max() < 150
    assert 0.08 < min(areas) < 0.13 and 0.45 < max(areas) < 0.53 and 0.27 < np.mean(areas) < 0.33
    assert -0.36 < min(ratios) < -0.2 and 0.2 < max(ratios) < 0.36 and abs(np.mean(ratios)) < 0.04
    assert np.std(starts, axis=0).min() > 15


def test_a_crop_that_never_fits_is_the_largest_in_the_middle() -> None:
    strip = np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (6, 1, 3))
    found = picture(augment.random_resized_crop, strip, rng(), 8, area=(1.0, 1.0))
    assert found[0, 0, 0] >= 55 and found[0, -1, 0] <= 64  # 8 of 120 columns, 6 · 4/3


def test_a_padded_crop_is_a_shift_with_a_border() -> None:
    image = IMAGE | 1  # no black
    shifts = set()
    for seed in range(200):
        found = picture(augment.pad_crop, image, rng(seed), 2)
        assert found.shape == image.shape
        framed = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        (place,) = [(y, x) for y in range(5) for x in range(5) if np.array_equal(framed[y : y + 24, x : x + 36], found)]
        shifts.add(place)
    assert len(shifts) == 25


def test_a_warp_moves_points_where_the_matrix_says() -> None:
    image = np.zeros((21, 31, 3), np.uint8)
    image[10, 18] = 255  # 3 right of the middle
    assert np.array_equal(picture(augment.warp, image, np.eye(2), np.zeros(2)), image)
    assert picture(augment.warp, image, np.eye(2), np.array([2, -4]))[6, 20, 0] == 255
    turned = picture(augment.warp, image, np.array([[0.0, -1.0], [1.0, 0.0]]), np.zeros(2))  # x to y: down
    assert turned[13, 15, 0] == 255 and turned.astype(int).sum() == 3 * 255
    assert picture(augment.warp, image, np.eye(2) * 2, np.zeros(2))[10, 21, 0] > 100
    assert picture(augment.warp, image, np.eye(2), np.array([5, 0]), fill=9)[0, 0, 1] == 9


def test_a_small_movement_is_small_and_none_is_none() -> None:
    still = picture(augment.affine, IMAGE, rng(), degrees=0, shift=0, scale=0, shear=0)
    assert np.array_equal(still, IMAGE)
    blob = np.zeros((40, 40, 3), np.uint8)
    blob[15:25, 15:25] = 200
    middles = []
    for seed in range(100):
        found = picture(augment.affine, blob, rng(seed))[..., 0].astype(float)
        assert 0.6 < found.sum() / blob[..., 0].astype(float).sum() < 1.45
        middles.append(np.average(np.indices(found.shape).reshape(2, -1), axis=1, weights=found.ravel()) - 19.5)
    assert np.abs(middles).max() < 4.2 and np.std(middles) > 1.5


def test_jitter_at_strength_nothing_changes_nothing() -> None:
    assert np.array_equal(augment.color_jitter(IMAGE, rng()), IMAGE)


def test_each_jitter_does_what_it_is_called() -> None:
    soft = (IMAGE // 4 + 90).astype(np.uint8)  # nothing is clipped
    ratios = []
    for seed in range(5):
        bright = augment.color_jitter(soft, rng(seed), brightness=0.3) / soft
        assert bright.std() < 0.01 and 0.69 < bright.mean() < 1.31
        contrast = augment.color_jitter(soft, rng(seed), contrast=0.5).astype(float)
        luma = [image @ [0.299, 0.587, 0.114] for image in (contrast, soft.astype(float))]
        assert abs(luma[0].mean() - luma[1].mean()) < 0.1
        ratios.append(luma[0].std() / luma[1].std())
        vivid = augment.color_jitter(soft, rng(seed), saturation=0.5).astype(float)
        assert np.abs(vivid @ [0.299, 0.587, 0.114] - luma[1]).max() < 1  # each channel is rounded
    assert 0.5 < min(ratios) < 0.85 and 1.15 < max(ratios) < 1.5
    assert np.array_equal(
        augment.color_jitter(augment.greyscale(IMAGE), rng(), saturation=0.9), augment.greyscale(IMAGE)
    )


def test_hue_turns_as_the_textbook_says() -> None:
    for turn in (1 / 3, -0.1, 0.5):
        found = augment.rotate_hue(IMAGE.astype(np.float32), turn)
        for y, x in ((0, 0), (5, 7), (20, 30)):
            h, s, v = colorsys.rgb_to_hsv(*(IMAGE[y, x] / 255))
            close(found[y, x], 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)), scale=255.0)
    close(augment.rotate_hue(IMAGE.astype(np.float32), 1.0), IMAGE)
    assert not np.array_equal(augment.color_jitter(IMAGE, rng(), hue=0.2), IMAGE)


@pytest.mark.parametrize("seed", range(8))
def test_the_hue_of_grey_is_not_turned_and_draws_stay_where_they_were(seed: int) -> None:
    """A speck of colour makes the whole image go through the turn, which must leave the grey of it alone."""
    strengths = {"brightness": 0.8, "contrast": 0.0, "saturation": 0.0, "hue": 0.2}
    grey = augment.greyscale(IMAGE)
    speck = grey.copy()
    speck[0, 0] = 200, 10, 10
    random = rng(seed)
    found = augment.color_jitter(grey, random, **strengths)
    again = rng(seed)
    turned = augment.color_jitter(speck, again, **strengths)
    assert random.random() == again.random()
    assert np.array_equal(found.reshape(-1, 3)[1:], turned.reshape(-1, 3)[1:])
    still = augment.color_jitter(speck, rng(seed), **strengths | {"hue": 0.0})
    assert not np.array_equal(turned[0, 0], still[0, 0])


def test_the_order_of_the_jitters_is_drawn() -> None:
    found = {
        augment.color_jitter(IMAGE, _Ordered(order), brightness=0.8, contrast=0.8, hue=0.2).tobytes()
        for order in range(24)
    }
    assert len(found) > 3


class _Ordered(np.random.Generator):
    """Equal strengths, one order of the 24."""

    def __init__(self, order: int) -> None:
        super().__init__(np.random.PCG64(0))
        self._order = order

    def permutation(self, n: int) -> np.ndarray:  # type: ignore[override]
        return np.random.default_rng(self._order).permutation(n)


def test_a_blur_keeps_the_mean_and_lowers_the_contrast() -> None:
    found = augment.blur(IMAGE, rng(1), sigma=(1.5, 1.5), kernel=0.5)
    assert abs(found.mean() - IMAGE.mean()) < 0.1 and found.std() < 0.5 * IMAGE.std()
    assert np.array_equal(augment.blur(IMAGE, rng(), sigma=(1e-3, 1e-3)), IMAGE)
    dot = np.zeros((31, 31, 3), np.uint8)
    dot[15, 15] = 255
    found = augment.blur(dot, rng(), sigma=(1.0, 1.0), kernel=0.2)  # 6 pixels: 3 to each side
    assert 0.97 < found[15, 15, 0] * 2 * np.pi / 255 < 1.03
    found = augment.blur(dot, rng(), sigma=(3.0, 3.0), kernel=0.2)
    assert np.flatnonzero(found[15, :, 0]).tolist() == list(range(12, 19))


def test_noise_has_its_strength() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert 0.95 < augment.noise(grey, rng(), 0.05).std() / (0.05 * 255) < 1.05


def test_erasing_takes_a_rectangle_of_the_area_it_should() -> None:
    image = np.full((50, 60, 3), 9, np.float32)
    shares = []
    for seed in range(200):
        found = augment.erase(image, rng(seed), 1.0)
        gone = (found != 9).all(axis=2)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert gone.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        shares.append(gone.mean())
    assert 0.015 < min(shares) < 0.05 and 0.28 < max(shares) < 0.35
    assert abs(np.mean(found[gone])) < 0.2 and 0.8 < np.std(found[gone]) < 1.2
    assert augment.erase(image, rng(), 0.0) is image and (image == 9).all()
    with pytest.raises(DataError, match="normalise first"):
        augment.erase(IMAGE, rng(), 1.0)


def test_there_are_the_papers_fourteen_operations_and_each_works() -> None:
    assert len(OPERATIONS) == 14
    smooth = np.tile(np.linspace(40, 200, 36).astype(np.uint8)[None, :, None], (24, 1, 3))
    smooth[5:9, 5:15] = [250, 30, 90]
    for name, operation in OPERATIONS.items():
        found = picture(operation, smooth, 0.9, 1)
        assert found.dtype == np.uint8 and found.shape == smooth.shape
        assert np.array_equal(found, smooth) == (name == "identity"), name
        if name not in ("identity", "autocontrast", "equalize"):
            np.testing.assert_array_equal(picture(operation, smooth, 0.0, 1), smooth, err_msg=name)
    for name in (
        "rotate",
        "color",
        "contrast",
        "brightness",
        "sharpness",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
    ):
        assert not np.array_equal(*(picture(OPERATIONS[name], smooth, 0.5, sign) for sign in (1, -1))), name
    assert (picture(OPERATIONS["solarize"], smooth, 1.0, 1) == 255 - smooth).all()
    assert set(np.unique(picture(OPERATIONS["posterize"], smooth, 1.0, 1)) % 16) == {0}


def test_rand_augment_draws_all_of_them_and_none_at_no_layers() -> None:
    assert rand_augment(IMAGE, rng(), 0)[0] is IMAGE
    assert len({picture(rand_augment, IMAGE, rng(seed), 1).tobytes() for seed in range(200)}) >= 18
    with pytest.raises(ConfigError, match="0 to 10, not 11"):
        rand_augment(IMAGE, rng(), 1, 11)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: picture(augment.random_resized_crop, IMAGE, r, 16),
        lambda r: picture(augment.pad_crop, IMAGE, r),
        lambda r: picture(augment.affine, IMAGE, r),
        lambda r: augment.color_jitter(IMAGE, r, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        lambda r: augment.blur(IMAGE, r),
        lambda r: augment.noise(IMAGE, r, 0.1),
        lambda r: picture(rand_augment, IMAGE, r, 3),
        lambda r: augment.erase(IMAGE / np.float32(255), r, 1.0),
    ],
)
def test_equal_seeds_give_equal_bytes_and_the_input_stays(change) -> None:  # type: ignore[no-untyped-def]
    before = IMAGE.copy()
    assert np.array_equal(change(rng(3)), change(rng(3))) and np.array_equal(IMAGE, before)
    assert any(not np.array_equal(change(rng(3)), change(rng(seed))) for seed in range(4, 9))
