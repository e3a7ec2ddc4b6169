import jax
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.ops import anchor_points
from fm_jax.ops.assignment import simota
from tests.close import close

AT = anchor_points.points(64, 96, (8, 16, 32))
POINTS, CLASSES, MOST = len(AT.cell), 3, 6
assign = jax.jit(lambda given: simota(*given[:3], AT, *given[3:]))


def drawn(seed, count=None):
    """Return the inputs of `simota`, of `count` boxes and padding; half of the predictions are near some box."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, MOST + 1) if count is None else count
    centre, half = rng.uniform(5, 60, (MOST, 2)), rng.uniform(3, 25, (MOST, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    guess = (
        boxes[np.abs(AT.centre[:, None] - centre[:count]).max(-1).argmin(1)]
        if count
        else np.tile(boxes[:1], (POINTS, 1))
    )
    predicted = guess + rng.normal(0, rng.choice([1, 3, 9], (POINTS, 1)), (POINTS, 4))
    logits, sure = rng.normal(-1, 2, (POINTS, CLASSES)), rng.normal(-1, 2, POINTS)
    floats = [array.astype(np.float32) for array in (predicted, logits, sure, boxes)]
    return (*floats, rng.integers(0, CLASSES, MOST).astype(np.int32), np.arange(MOST) < count)


def shared(a, b):  # the IoU of one box with many, in float64
    a, b = np.float64(a), np.float64(b)
    low, high = np.maximum(a[:2], b[:, :2]), np.minimum(a[2:], b[:, 2:])
    inside = np.maximum(high - low, 0).prod(1)
    both = np.maximum(a[2:] - a[:2], 0).prod() + np.maximum(b[:, 2:] - b[:, :2], 0).prod(1) - inside
    return np.where(both > 0, inside / np.where(both > 0, both, 1), 0)


def by_hand(predicted, logits, sure, boxes, labels, mask):
    """Follow the paper box by box: {point: box}, and what the IoUs are."""
    boxes, labels = boxes[mask], labels[mask]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = [np.abs(AT.centre - centre).max(1) < 1.5 * AT.stride[:, 0] for centre in centres]
    candidates = np.flatnonzero(np.any(near, axis=0)) if len(boxes) else np.zeros(0, int)
    p = np.sqrt(1 / (1 + np.exp(-np.float64(logits))) / (1 + np.exp(-np.float64(sure)))[:, None])[candidates]
    wants, costs, ious = {point: [] for point in candidates}, [], []
    for i, box in enumerate(boxes):
        iou, target = shared(box, predicted[candidates]), np.arange(CLASSES) == labels[i]
        entropy = -np.where(target, np.log(p), np.log(1 - p)).sum(1)
        cost = entropy - 3 * np.log(iou + 1e-8) + 1e6 * ~near[i][candidates]
        k = max(1, int(np.sort(iou)[::-1][:10].sum()))
        for place in np.argsort(cost, kind="stable")[:k]:
            wants[candidates[place]].append(i)
        costs.append(dict(zip(candidates, cost, strict=True)))
        ious.append(dict(zip(candidates, iou, strict=True)))
    owner = {}
    for point, rivals in wants.items():
        if rivals:  # one that several want goes to the cheapest of all boxes
            who = rivals if len(rivals) == 1 else range(len(boxes))
            owner[point] = min(who, key=lambda box, point=point: costs[box][point])
    return owner, {point: ious[box][point] for point, box in owner.items()}


def test_points_are_assigned_as_by_hand():
    contested = 0
    for seed in range(40):
        given = drawn(seed)
        found, (owner, iou) = assign(given), by_hand(*given)
        assert set(np.flatnonzero(found.positive)) == set(owner)
        assert {point: int(found.box[point]) for point in owner} == owner
        close(found.iou, np.array([iou.get(point, 0.0) for point in range(POINTS)]), 1e-4, scale=1.0)
        contested += len(owner)
    assert contested > 400  # k is more than one


def test_padding_changes_no_bit():
    given = drawn(3, count=4)
    short = tuple(array[:4] if len(array) == MOST else array for array in given)
    rng = np.random.default_rng(0)
    noise = (*given[:3], *(np.where(given[5].reshape(-1, *(1,) * (array.ndim - 1)), array, other) for array, other in (
        (given[3], rng.uniform(0, 64, (MOST, 4)).astype(np.float32)), (given[4], np.int32(-1)),
    )), given[5])  # fmt: skip
    for other in (short, noise):
        jax.tree.map(np.testing.assert_array_equal, assign(other), assign(given))


def test_the_order_of_boxes_means_nothing():
    given, order = drawn(5, count=MOST), np.random.default_rng(0).permutation(MOST)
    found, other = assign(given), assign((*given[:3], *(array[order] for array in given[3:])))
    np.testing.assert_array_equal(found.positive, other.positive)
    there = np.asarray(found.positive)
    np.testing.assert_array_equal(np.asarray(found.box)[there], order[np.asarray(other.box)[there]])


def test_an_image_without_boxes_has_no_positive_point():
    found = assign(drawn(0, count=0))
    assert not found.positive.any() and not found.iou.any() and not found.box.any()


def test_predictions_without_end_are_survived():
    """exp of a large logit makes a box of infinite sides: its IoU is 0, not NaN."""
    given = drawn(1, count=3)
    predicted = given[0].copy()
    predicted[::2] = [-np.inf, -np.inf, np.inf, np.inf]
    found = assign((predicted, *given[1:]))
    assert found.positive.any() and np.isfinite(found.iou).all()


def test_offsets_and_boxes_are_each_others_inverse():
    rng = np.random.default_rng(0)
    offsets = rng.normal(0, 1, (2, POINTS, 4)).astype(np.float32)
    boxes = anchor_points.decode(offsets, AT)
    close(anchor_points.encode(boxes, AT), offsets, 1e-4)
    column, row, stride = 2, 1, 16  # the second map begins after the 8 × 12 cells of the first
    place = 8 * 12 + row * 6 + column
    np.testing.assert_array_equal(AT.centre[place], [(column + 0.5) * stride, (row + 0.5) * stride])
    still = anchor_points.decode(np.zeros((POINTS, 4), np.float32), AT)[place]
    np.testing.assert_array_equal(still, [24, 8, 40, 24])  # a centre at the cell's corner, sides of one cell
    assert np.isfinite(anchor_points.encode(np.zeros((POINTS, 4), np.float32), AT)).all()


@pytest.mark.parametrize("size", [(64, 100), (48, 96), (0, 32)])
def test_images_that_the_strides_do_not_divide_are_refused(size):
    with pytest.raises(ConfigError, match=r"not multiples of the stride .* multiples of 32"):
        anchor_points.points(*size, (8, 16, 32))
