from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.objectives.detection.yolov3 import yolov3
from tests.close import close

SIZE, STRIDES = (16, 24), (8, 4)
ANCHORS = (((6.0, 5.0), (8.0, 12.0)), ((2.0, 3.0), (4.0, 3.0)))
B, N, K, IGNORE = 4, 2 * (6 + 24), 3, 0.4
RNG = np.random.default_rng(0)
# "apply" returns its parameters: the loss is looked at as a function of the predictions
PARAMS = {
    "boxes": RNG.normal(0, 0.7, (B, N, 4)).astype(np.float32),
    "objectness": RNG.normal(0, 1.5, (B, N)).astype(np.float32),
    "classes": RNG.normal(0, 1.5, (B, N, K)).astype(np.float32),
}
LOSS = yolov3(
    lambda variables, images: tuple(variables["params"][name] for name in ("boxes", "objectness", "classes")),
    strides=STRIDES, anchors=ANCHORS, ignore=IGNORE,
)  # fmt: skip
# two in the first image belong to one candidate; the second has none; in the third one is as wide as the image
TRUTH = [
    [([9, 9, 11, 12], 1), ([9.5, 9, 11.5, 12.2], 2), ([1, 2, 9, 14], 0)],
    [],
    [([-2, 1, 26, 15], 2), ([22, 14, 24, 16], 0), ([3, 3, 7, 6], 1), ([4, 10, 10, 15], 1)],
    [([8, 8, 14, 13], 2)],
]


def batch(rows=4, weights=(1, 1, 1, 1)):
    boxes, labels = np.zeros((B, rows, 4), np.float32), np.zeros((B, rows), np.int32)
    mask = np.zeros((B, rows), bool)
    for image, listed in enumerate(TRUTH):
        for row, (box, label) in enumerate(listed):
            boxes[image, row], labels[image, row], mask[image, row] = box, label, True
    images = np.zeros((B, *SIZE, 3), np.float32)
    fields = {"images": images, "boxes": boxes, "labels": labels, "box_mask": mask}
    return {**fields, "weights": np.asarray(weights, np.float32)}


@jax.jit
def compute(params, batch):
    """Return (loss, gradient of its sum)."""

    def summed(params):
        found = LOSS(params, batch, None, None)
        return found.sum, found

    (_, found), gradient = jax.value_and_grad(summed, has_aux=True)(params)
    return found, gradient


@cache
def computed(rows=4, weights=(1, 1, 1, 1)):
    return jax.device_get(compute(PARAMS, batch(rows, weights)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def overlap(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = np.prod(np.maximum(sides, 0))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def cells():
    """Yield (column, row, stride, anchor) of every candidate in order."""
    for stride, pairs in zip(STRIDES, ANCHORS, strict=True):
        for row in range(SIZE[0] // stride):
            for column in range(SIZE[1] // stride):
                for pair in pairs:
                    yield column, row, stride, np.array(pair)


def darknet(image):
    """Return Darknet's deltas for one image by its own loops, (boxes [N, 4], objectness [N], classes [N, K]), and IoUs.

    A delta is minus the gradient of the loss by the logit.
    """
    t, objectness, classes = (PARAMS[name][image].astype(float) for name in ("boxes", "objectness", "classes"))
    where, deltas, found = list(cells()), (np.zeros((N, 4)), np.zeros(N), np.zeros((N, K))), {}
    predicted = []
    for number, (column, row, stride, pair) in enumerate(where):
        centre = (sigmoid(t[number, :2]) + np.array([column, row])) * stride
        side = np.exp(t[number, 2:]) * pair
        predicted.append(np.concatenate([centre - side / 2, centre + side / 2]))
        best = max((overlap(predicted[-1], np.array(box, float)) for box, _ in TRUTH[image]), default=0)
        deltas[1][number] = 0 if best > IGNORE else -sigmoid(objectness[number])
    for box, label in TRUTH[image]:
        box = np.array(box, float)
        centre, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        shapes = [np.concatenate([-pair / 2, pair / 2]) for pairs in ANCHORS for pair in map(np.array, pairs)]
        best = int(np.argmax([overlap(np.concatenate([-side / 2, side / 2]), shape) for shape in shapes]))
        stride = STRIDES[best // 2]
        at = (*np.floor(centre / stride).astype(int), stride)
        number = next(
            n
            for n, (x, y, s, pair) in enumerate(where)
            if (x, y, s) == at and tuple(pair) == ANCHORS[best // 2][best % 2]
        )
        scale = 2 - np.prod(side) / (SIZE[0] * SIZE[1])
        target = np.concatenate([centre / stride - at[:2], np.log(side / where[number][3])])
        deltas[0][number] = scale * (target - np.concatenate([sigmoid(t[number, :2]), t[number, 2:]]))
        deltas[1][number] = 1 - sigmoid(objectness[number])
        if deltas[2][number].any():  # Darknet adds a class to those that are there
            deltas[2][number, label] = 1 - sigmoid(classes[number, label])
        else:
            deltas[2][number] = np.eye(K)[label] - sigmoid(classes[number])
        found[number] = overlap(predicted[number], box)
    return deltas, found


def test_the_gradient_is_darknets_deltas():
    _, gradient = computed()
    for image in range(B):
        deltas, _ = darknet(image)
        for name, want in zip(("boxes", "objectness", "classes"), deltas, strict=True):
            close(-gradient[name][image], want, scale=1.0)
    assert any((darknet(image)[0][1] == 0).any() for image in range(B))  # some candidate is ignored


def test_the_loss_is_what_its_words_say():
    """Cross-entropies, and half the squares of the sizes: added up here from the targets that the deltas imply."""
    found, _ = computed()
    want = {"box": 0.0, "objectness": 0.0, "class": 0.0}

    def entropy(logit, target):
        p = sigmoid(logit)
        return -(target * np.log(p) + (1 - target) * np.log(1 - p))

    overlaps = []
    for image in range(B):
        (shape, objects, kinds), chosen = darknet(image)
        t, objectness, classes = (PARAMS[name][image].astype(float) for name in ("boxes", "objectness", "classes"))
        for number in np.flatnonzero(objects):
            target = objects[number] + sigmoid(objectness[number])
            want["objectness"] += entropy(objectness[number], target)
        for number in chosen:
            box = next(np.array(box, float) for box, _ in reversed(TRUTH[image]) if _owner(image, box) == number)
            scale = 2 - np.prod(box[2:] - box[:2]) / (SIZE[0] * SIZE[1])
            place = shape[number, :2] / scale + sigmoid(t[number, :2])
            want["box"] += scale * entropy(t[number, :2], place).sum() + 0.5 * (shape[number, 2:] ** 2).sum() / scale
            want["class"] += entropy(classes[number], np.round(kinds[number] + sigmoid(classes[number]))).sum()
        overlaps += chosen.values()
    for name, total in want.items():
        close(found.metrics[name], (total, B))
    close((found.sum, found.weight), (sum(want.values()), B))
    close(found.metrics["iou"], (sum(overlaps), len(overlaps)))
    assert found.metrics["recall"] == (sum(value > 0.5 for value in overlaps), len(overlaps))
    assert len(overlaps) == 7  # of eight boxes, two share a candidate


def _owner(image, box):
    alone, listed = TRUTH[image], [(box, 0)]
    TRUTH[image] = listed
    try:
        return next(iter(darknet(image)[1]))
    finally:
        TRUTH[image] = alone


def test_padding_changes_no_bit():
    few, more = computed(), computed(23)
    jax.tree.map(np.testing.assert_array_equal, few, more)


def test_an_image_without_objects_has_a_finite_loss_and_gradient():
    found, gradient = computed(weights=(0, 1, 0, 0))
    close(found.sum, np.log1p(np.exp(PARAMS["objectness"][1].astype(float))).sum())
    assert found.metrics["box"][0] == found.metrics["class"][0] == found.metrics["iou"][1] == 0
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())
    assert not gradient["boxes"].any() and not gradient["objectness"][0].any()


def test_a_batch_without_room_for_boxes_is_one_without_boxes():
    none = {**batch(), "boxes": np.zeros((B, 0, 4), np.float32), "labels": np.zeros((B, 0), np.int32),
            "box_mask": np.zeros((B, 0), bool)}  # fmt: skip
    empty = {**batch(), "box_mask": np.zeros((B, 4), bool)}
    close(compute(PARAMS, none)[0].sum, compute(PARAMS, empty)[0].sum)


def test_a_row_of_weight_zero_may_be_anything():
    broken = {name: leaf.copy() for name, leaf in PARAMS.items()}
    for leaf in broken.values():
        leaf[2] = np.nan
    found, _ = compute(broken, batch(weights=(1, 1, 0, 1)))
    close(found.sum, computed(weights=(1, 1, 0, 1))[0].sum)
    assert found.weight == 3


def test_a_box_without_area_is_none():
    flat = batch()
    flat["boxes"][1, 3], flat["box_mask"][1, 3] = [5, 5, 5, 9], True
    close(compute(PARAMS, flat)[0].sum, computed()[0].sum)


def test_running_statistics_come_back_as_updates():
    def apply(variables, images, rngs, mutable):
        outputs = tuple(variables["params"][name] for name in ("boxes", "objectness", "classes"))
        return outputs, {"statistics": {"norm": {"mean": jnp.ones(2)}}}

    loss = yolov3(apply, strides=STRIDES, anchors=ANCHORS)
    updates = jax.eval_shape(lambda key: loss(PARAMS, batch(), key, None), jax.random.key(0)).updates
    assert jax.tree.map(lambda leaf: leaf.shape, updates) == {"norm/mean": ((2,), ())}


@pytest.mark.parametrize("ignore", [0.0, 1.5, -1.0])
def test_an_impossible_threshold_is_refused(ignore):
    with pytest.raises(ConfigError, match="ignore"):
        yolov3(lambda *_: None, strides=STRIDES, anchors=ANCHORS, ignore=ignore)
