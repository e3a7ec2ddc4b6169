import jax
import numpy as np

from fm_jax.ops import boxes as box_ops
from fm_jax.ops.anchors import anchors, propose
from tests.close import close

SHAPES, IMAGE = [(4, 6), (2, 3)], (32, 48)
BOXES = np.asarray(anchors(SHAPES, IMAGE, (8.0, 16.0), (0.5, 2.0)))
COUNTS = (48, 12)
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(2, 60)).astype(np.float32)
DELTAS = RNG.normal(0, 0.3, (2, 60, 4)).astype(np.float32)


def test_anchors_go_by_level_row_column_and_ratio():
    assert BOXES.shape == (60, 4)
    # the root of the area is 8, width / height 2 and 1/2: 11.3 × 5.7 and 5.7 × 11.3, corners rounded
    np.testing.assert_array_equal(BOXES[:2], [[-6, -3, 6, 3], [-3, -6, 3, 6]])
    np.testing.assert_array_equal(BOXES[2] - BOXES[0], [8, 0, 8, 0])
    np.testing.assert_array_equal(BOXES[12] - BOXES[0], [0, 8, 0, 8])
    np.testing.assert_array_equal(BOXES[48], [-11, -6, 11, 6])  # 22.6 × 11.3
    np.testing.assert_array_equal(BOXES[54] - BOXES[48], [0, 16, 0, 16])


def oracle(scores, deltas, before, after, overlap):
    """Choose the best of each level, decode, clip, drop the empty, suppress within levels, and order."""
    kept, start = [], 0
    for level, count in enumerate(COUNTS):
        order = start + np.argsort(-scores[start : start + count], kind="stable")[:before]
        found = np.asarray(box_ops.decode(deltas[order], BOXES[order]))
        found = np.clip(found, 0, [48, 32, 48, 32])
        alive = [n for n in range(len(order)) if (found[n, 2:] - found[n, :2] >= 1e-3).all()]
        while alive:
            best, *alive = alive
            kept.append((scores[order[best]], found[best], level))
            alive = [n for n in alive if float(box_ops.iou(found[n], found[best])) <= overlap]
        start += count
    kept.sort(key=lambda each: -each[0])
    return np.array([box for _, box, _ in kept[:after]])


def test_proposals_are_the_best_boxes_of_each_level_without_duplicates():
    got = jax.jit(lambda s, d: propose(s, d, BOXES, COUNTS, IMAGE, before=20, after=16, overlap=0.4))(SCORES, DELTAS)
    for image in range(2):
        want = oracle(SCORES[image], DELTAS[image], 20, 16, 0.4)
        assert got.valid[image].sum() == len(want)
        close(got.boxes[image][: len(want)], want)


def test_missing_proposals_are_marked_and_zero():
    got = propose(SCORES, DELTAS, BOXES, COUNTS, IMAGE, before=3, after=50, overlap=0.7)
    assert 0 < got.valid.sum(axis=1).max() <= 6
    assert not np.asarray(got.boxes)[~np.asarray(got.valid)].any()


def test_no_gradient_flows_through_proposals():
    def total(scores, deltas):
        return propose(scores, deltas, BOXES, COUNTS, IMAGE, before=20, after=16, overlap=0.7).boxes.sum()

    assert not any(slope.any() for slope in jax.grad(total, argnums=(0, 1))(SCORES, DELTAS))
