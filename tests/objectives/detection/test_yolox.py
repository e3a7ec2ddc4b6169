"""The loss on predictions that are the parameters themselves. Its values: ../../goldens/yolox.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Loss
from fm_jax.models.vision.yolox import Raw
from fm_jax.objectives.detection.yolox import yolox
from fm_jax.ops import anchor_points
from tests.close import close

SIDE, ROWS, CLASSES = 64, 3, 3
AT = anchor_points.points(SIDE, SIDE, (8, 16, 32))
POINTS = len(AT.cell)
COUNTS = (3, 0, 2)  # boxes of each image


def batch(most=4, seed=0):
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(8, 56, (ROWS, 4, 2)), rng.uniform(4, 20, (ROWS, 4, 2))
    mask = np.arange(most) < np.array(COUNTS)[:, None]
    boxes = np.concatenate([centre - half, centre + half], axis=-1).astype(np.float32)
    boxes = np.pad(boxes, [(0, 0), (0, most - 4), (0, 0)]) * mask[..., None]
    labels = np.pad(rng.integers(0, CLASSES, (ROWS, 4)), [(0, 0), (0, most - 4)]) * mask
    return {
        "images": np.zeros((ROWS, SIDE, SIDE, 3), np.float32),
        "boxes": boxes,
        "labels": labels.astype(np.int32),
        "box_mask": mask,
        "weights": np.ones(ROWS, np.float32),
    }


def predictions(seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"boxes": (ROWS, POINTS, 4), "objectness": (ROWS, POINTS), "classes": (ROWS, POINTS, CLASSES)}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def apply(variables, images, rngs=None, **options):
    raw = Raw(**variables["params"])
    return (raw, {}) if options else raw


@jax.jit
def answer(params, fields, step=None):
    """Return the sums, their weight, and the gradient of the sum."""

    def total(params):
        found = yolox(apply, l1_from=3)(params, fields, None, step)
        return found.sum, found

    gradient, found = jax.grad(total, has_aux=True)(params)
    return found, gradient


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_padding_changes_no_bit():
    """Twenty more rows without boxes; and whatever stands in them, labels of -1 among it."""
    found = answer(predictions(), batch())
    same(answer(predictions(), batch(24)), found)
    filled = batch(24)
    noise = np.random.default_rng(2).uniform(0, SIDE, filled["boxes"].shape).astype(np.float32)
    filled["boxes"] = np.where(filled["box_mask"][..., None], filled["boxes"], noise)
    filled["labels"] = np.where(filled["box_mask"], filled["labels"], -1).astype(np.int32)
    same(answer(predictions(), filled), found)


def test_images_of_weight_zero_change_no_bit():
    """Not even predictions that are NaN: those of padding are whatever the model makes of zeros."""
    fields, params = batch(), predictions()
    fields["weights"][2] = 0
    found, gradient = answer(params, fields)
    assert found.weight < answer(params, batch())[0].weight
    for part in params.values():
        part[2] = np.nan
    other, slopes = answer(params, fields)
    same(other, found)
    for name in slopes:
        np.testing.assert_array_equal(slopes[name][:2], gradient[name][:2])


def test_an_image_without_boxes_teaches_only_that_there_is_none():
    fields = batch()
    fields["box_mask"][:] = False
    found, gradient = answer(predictions(), fields)
    assert found.weight == 1 and np.isfinite(found.sum)
    assert not gradient["boxes"].any() and not gradient["classes"].any() and (gradient["objectness"] > 0).all()
    close(found.sum, np.logaddexp(0, predictions()["objectness"]).sum())
    assert found.metrics["positives"] == (0, 0)


def test_a_batch_of_padding_weighs_nothing():
    fields = batch()
    fields["weights"][:] = 0
    found, gradient = answer(predictions(), fields)
    assert found.sum == found.weight == 0
    assert not any(part.any() for part in gradient.values())


def test_the_distance_of_offsets_is_added_late_and_in_evaluation():
    sums = [answer(predictions(), batch(), step)[0].sum for step in (np.int32(2), np.int32(3), None)]
    metrics = answer(predictions(), batch())[0].metrics
    l1 = float(metrics["l1_loss"][0])
    assert l1 > 1
    close(np.array([float(later - sums[0]) for later in sums[1:]]), l1, 1e-4)
    named = ("iou_loss", "objectness_loss", "class_loss")
    close(sums[0], sum(float(metrics[name][0]) for name in named))
    with pytest.raises(ConfigError, match="l1_from must be at least 0"):
        yolox(apply, l1_from=-1)


def test_right_predictions_cost_nothing():
    """Every positive point predicts its box, its class and that it is there; the others are sure of nothing."""
    fields = batch()
    params = {name: np.zeros_like(part) for name, part in predictions().items()}
    for row, count in enumerate(COUNTS):
        centres = fields["boxes"][row, :count].reshape(count, 2, 2).mean(1)
        near = (np.abs(AT.centre[:, None] - centres) < 1.5 * AT.stride[:, None]).all(-1)
        whose = (
            (np.abs(AT.centre[:, None] - centres).max(-1) - 1e6 * near).argmin(1) if count else np.zeros(POINTS, int)
        )
        boxes = fields["boxes"][row, whose]
        params["boxes"][row] = anchor_points.encode(boxes, AT) if count else 0
        params["classes"][row] = 60 * (np.eye(CLASSES)[fields["labels"][row, whose]] - 0.5)
    from_start, _ = answer(params, fields)
    assert from_start.metrics["iou"][0] > 0.999 * from_start.metrics["iou"][1]
    for name in ("iou_loss", "class_loss", "l1_loss"):
        close(from_start.metrics[name][0], 0.0, 1e-3, scale=1.0)


def test_gradients_are_finite_at_any_prediction():
    """Boxes far from all objects, without sides, and huge; beyond float32 too, at points that answer for no object."""
    params = predictions()
    params["boxes"][:, ::3, 2:] = 20
    params["boxes"][1, ::3, 2:] = 200
    params["boxes"][:, 1::3, 2:] = -200
    params["boxes"][:, 2::3, :2] = 1e4
    found, gradient = answer(params, batch())
    assert np.isfinite(found.sum)
    assert all(np.isfinite(part).all() for part in gradient.values())


def test_the_loss_of_microbatches_adds_up_to_the_batchs():
    whole, _ = answer(predictions(), batch())
    parts = []
    for rows in (slice(0, 1), slice(2, 3)):
        fields = {name: part[rows] for name, part in batch().items()}
        parts.append(answer({name: part[rows] for name, part in predictions().items()}, fields)[0])
    assert isinstance(whole, Loss)
    assert sum(float(part.weight) for part in parts) == whole.weight
    alone = np.logaddexp(0, predictions()["objectness"][1]).sum()
    close(sum(float(part.sum) for part in parts) + alone, whole.sum)
    assert jnp.isfinite(whole.sum)
