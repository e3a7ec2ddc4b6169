from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.ops import roi
from tests.close import close

RNG = np.random.default_rng(0)
MAPS = [RNG.normal(size=(2, 12 // 2**n, 16 // 2**n, 3)).astype(np.float32) for n in range(3)]
SCALES = (0.25, 0.125, 0.0625)
CORNER, SIDE = RNG.uniform(-4, 30, (2, 7, 2)), RNG.uniform(0.1, 40, (2, 7, 2))
BOXES = np.concatenate([CORNER, CORNER + SIDE], axis=2).astype(np.float32)
BOXES[0, 0] = 0  # padding
BOXES[0, 1] = [63.5, 3, 64, 40]  # thinner than a position, at the edge
CROP = partial(roi.pyramid_roi_align, size=3, scales=SCALES, canonical=20.0)


def oracle(image, box, size, scale, sampling, aligned):
    """Crop one box from one map [H, W, C], point by point."""
    height, width, channels = image.shape
    left, top, right, bottom = (value * scale - 0.5 * aligned for value in box.astype(float))
    wide, high = right - left, bottom - top
    if not aligned:
        wide, high = max(wide, 1.0), max(high, 1.0)
    found = np.zeros((size, size, channels))
    for place in np.ndindex(size, size, sampling, sampling):
        y = top + (place[0] + (place[2] + 0.5) / sampling) * high / size
        x = left + (place[1] + (place[3] + 0.5) / sampling) * wide / size
        if not (-1 <= y <= height and -1 <= x <= width):
            continue
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        for row, column in np.ndindex(height, width):
            share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
            found[place[:2]] += share * image[row, column] / sampling**2
    return found


@pytest.fixture(params=["products", "gather"])
def form(request, monkeypatch):
    monkeypatch.setattr(roi, "_LARGEST", 0 if request.param == "gather" else 10**9)


@pytest.mark.parametrize(("aligned", "want"), [(False, [4.0, 8.0]), (True, [3.5, 7.5])])
def test_a_linear_ramp_gives_the_middle_of_each_bin(form, aligned, want):
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[None, None, :, None], (1, 16, 16, 1))
    got = roi.roi_align(ramp, np.array([[[2, 2, 10, 10]]], np.float32), 2, 1.0, aligned=aligned)
    close(got[0, 0, :, :, 0], np.array([want, want], np.float32))


@pytest.mark.parametrize(("aligned", "sampling"), [(False, 2), (True, 3)])
def test_a_crop_is_the_mean_of_interpolated_points(form, aligned, sampling):
    got = roi.roi_align(MAPS[0], BOXES, 2, 0.25, sampling, aligned=aligned)
    want = [
        [oracle(x, box, 2, 0.25, sampling, aligned) for box in boxes] for x, boxes in zip(MAPS[0], BOXES, strict=True)
    ]
    close(got, np.array(want), 1e-5)


def test_each_box_is_cropped_from_the_map_of_its_size(form):
    level = np.asarray(roi.levels(BOXES, 2, 3, 20.0))
    assert set(level.ravel()) == {0, 1, 2}
    want = [
        [oracle(MAPS[k][image], box, 3, SCALES[k], 2, False) for box, k in zip(BOXES[image], level[image], strict=True)]
        for image in range(2)
    ]
    close(CROP(MAPS, BOXES), np.array(want), 1e-5)


def test_both_forms_have_the_same_gradient(monkeypatch):
    weight = RNG.normal(size=(2, 7, 3, 3, 3)).astype(np.float32)
    slope = jax.grad(lambda maps: (CROP(maps, BOXES) * weight).sum())
    first = slope(MAPS)
    monkeypatch.setattr(roi, "_LARGEST", 0)
    close(slope(MAPS), first, 1e-5)


def test_boxes_in_parts_give_the_same(form, monkeypatch):
    weight = RNG.normal(size=(2, 7, 3, 3, 3)).astype(np.float32)

    def both(maps):
        return jax.value_and_grad(lambda maps: (CROP(maps, BOXES) * weight).sum())(maps)

    whole = both(MAPS)
    monkeypatch.setattr(roi, "_NUMBERS", 900)
    text = str(jax.make_jaxpr(both)(MAPS))
    assert "scan" in text
    close(both(MAPS), whole, 1e-5)


def test_the_level_of_a_side_follows_the_papers_rule():
    sides = np.array([1, 55, 56, 111.9, 112, 223, 224, 448, 5000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=-1)
    assert roi.levels(boxes, 2, 4).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]


def test_padding_gives_finite_crops_and_no_gradient_to_boxes_far_away(form):
    far = np.array([[[500, 500, 600, 600], [0, 0, 0, 0]]] * 2, np.float32)
    got = np.asarray(roi.roi_align(MAPS[0], far, 3, 0.25))
    assert not got[:, 0].any()
    assert np.isfinite(got).all()


def test_half_precision_stays_half(form):
    out = roi.roi_align(jnp.asarray(MAPS[0], jnp.bfloat16), BOXES, 2, 0.25)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), roi.roi_align(MAPS[0], BOXES, 2, 0.25), 0.1)
