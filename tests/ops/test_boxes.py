import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.ops import boxes
from tests.close import close

RNG = np.random.default_rng(0)
suppress = jax.jit(boxes.nms, static_argnums=(3,))


def drawn(count, rng=RNG, side=40.0):
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, side, (count, 2))], axis=1).astype(np.float32)


def overlap(a, b):  # the oracle: intersection over union of boxes, in float64
    (left, top, right, bottom), (x0, y0, x1, y1) = np.float64(a).T, np.float64(b).T
    shared = np.maximum(0, np.minimum(right, x1) - np.maximum(left, x0))
    shared = shared * np.maximum(0, np.minimum(bottom, y1) - np.maximum(top, y0))
    union = (right - left) * (bottom - top) + (x1 - x0) * (y1 - y0) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


def greedy(found, scores, threshold, limit, groups):
    chosen = []
    for i in np.argsort(-scores, kind="stable"):
        rivals = (overlap(found[i][None], found[chosen]) > threshold) & (groups[chosen] == groups[i])
        if scores[i] > -np.inf and not rivals.any() and len(chosen) < limit:
            chosen.append(int(i))
    return chosen


def kept(found, scores, threshold, limit, groups=None):
    index, valid = suppress(jnp.asarray(found), jnp.asarray(scores), threshold, limit, groups)
    count = int(valid.sum())
    assert index.shape == valid.shape == (limit,)
    assert index.dtype == jnp.int32
    assert valid[:count].all()
    assert not index[count:].any()
    return index[:count].tolist()


def test_overlaps_are_those_of_the_oracle():
    a, b = drawn(7), drawn(5)
    want = overlap(a[:, None].repeat(5, 1).reshape(-1, 4), np.tile(b, (7, 1))).reshape(7, 5)
    found = boxes.pairwise_iou(jnp.asarray(a), jnp.asarray(b))
    close(found, want, 1e-5)
    close(boxes.iou(jnp.asarray(a[:5]), jnp.asarray(b)), np.diag(want), 1e-5)
    batched = boxes.pairwise_iou(jnp.asarray(a)[None].repeat(2, 0), jnp.asarray(b)[None].repeat(2, 0))
    np.testing.assert_array_equal(batched[1], found)
    close(boxes.area(jnp.asarray(a)), (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]), 1e-6)


def test_boxes_without_area_overlap_nothing_and_give_no_nan():
    point, line, inverted, whole = [3.0, 3, 3, 3], [3.0, 0, 3, 9], [8.0, 8, 2, 2], [0.0, 0, 9, 9]
    both = jnp.array([point, line, inverted, whole, [0.0, 0, 0, 0]])
    np.testing.assert_array_equal(boxes.pairwise_iou(both, both), np.diag([0, 0, 0, 1, 0]))
    np.testing.assert_array_equal(boxes.area(both), [0, 0, 0, 81, 0])
    for measure in (boxes.iou, boxes.giou):
        values, slopes = jax.value_and_grad(lambda a, of=measure: of(a[:, None], both[None]).sum())(both)
        assert np.isfinite(values)
        assert np.isfinite(slopes).all()
    assert boxes.giou(both[:1], both[:1])[0] == 0


def test_generalised_overlap_is_that_of_the_paper_and_pulls_disjoint_boxes_together():
    a, b = (jnp.asarray(drawn(500, side=20.0)) for _ in range(2))
    found = boxes.giou(a, b)
    low, high = np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])
    hull = np.prod(np.float64(high - low), axis=1)
    shared = overlap(a, b)
    union = (np.asarray(boxes.area(a), np.float64) + boxes.area(b)) / (1 + shared)
    close(found, shared - (hull - union) / hull, 1e-5)
    assert found.min() >= -1
    assert found.max() <= 1
    assert (found < 0).any()
    near, far = jnp.array([0.0, 0, 2, 2]), jnp.array([6.0, 1, 9, 3])
    slope = jax.grad(lambda box: boxes.giou(box, far))(near)
    assert np.isfinite(slope).all()
    assert slope[2] > 0  # its right side should move right
    assert (jax.grad(lambda box: boxes.iou(box, far))(near) == 0).all()
    close(boxes.giou(near, near), 1.0)


def test_clipping_takes_one_size_or_one_for_each_image():
    found = jnp.array([[-3.0, -2, 30, 40], [1, 2, 3, 4], [50, 60, 70, 80]])
    want = [[0, 0, 10, 6], [1, 2, 3, 4], [10, 6, 10, 6]]
    np.testing.assert_array_equal(boxes.clip(found, 6, 10), want)
    two = boxes.clip(found[None].repeat(2, 0), jnp.array([[6.0], [100]]), jnp.array([[10.0], [20]]))
    np.testing.assert_array_equal(two[0], want)
    np.testing.assert_array_equal(two[1], [[0, 0, 20, 40], [1, 2, 3, 4], [20, 60, 20, 80]])


def test_centres_and_corners_are_inverse():
    np.testing.assert_array_equal(boxes.to_centre(jnp.array([2.0, 4, 8, 6])), [5, 5, 6, 2])
    found = jnp.asarray(drawn(20))
    close(boxes.from_centre(boxes.to_centre(found)), found, 1e-6)


def test_deltas_are_those_of_the_paper_and_decoding_inverts_them():
    found, anchors = jnp.asarray(drawn(50)), jnp.asarray(drawn(50))
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = boxes.encode(found, anchors, weights)
    box, anchor = (np.asarray(boxes.to_centre(each), np.float64) for each in (found, anchors))
    want = np.concatenate([10 * (box - anchor)[:, :2] / anchor[:, 2:], 5 * np.log(box / anchor)[:, 2:]], axis=1)
    close(deltas, want, 1e-5)
    close(boxes.decode(deltas, anchors, weights), found, 1e-5)
    close(boxes.decode(boxes.encode(found, anchors), anchors), found, 1e-5)
    per_class = jnp.stack([deltas, 0 * deltas], axis=1)  # [N, classes, 4] of one anchor each
    close(boxes.decode(per_class, anchors[:, None], weights)[:, 1], anchors, 1e-5)


def test_deltas_of_padding_are_finite_and_growth_is_limited():
    anchor = jnp.array([0.0, 0, 16, 16])
    assert np.isfinite(boxes.encode(jnp.zeros(4), anchor)).all()
    assert np.isfinite(boxes.encode(anchor, jnp.zeros(4))).all()
    close(boxes.decode(jnp.array([0.0, 0, 50, 50]), anchor), np.array([-492.0, -492, 508, 508]), 1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.65])
@pytest.mark.parametrize("grouped", [False, True])
def test_suppression_is_that_of_the_greedy_oracle(threshold, grouped):
    for case in range(6):
        rng = np.random.default_rng(case)
        found, scores = drawn(300, rng), rng.random(300).astype(np.float32)
        if case % 3 == 1:
            scores = np.round(scores, 1)  # many ties
        if case % 3 == 2:
            scores[rng.random(300) < 0.6] = -np.inf
        groups = rng.integers(0, 4, 300) if grouped else np.zeros(300, int)
        for limit in (300, 20):
            got = kept(found, scores, threshold, limit, jnp.asarray(groups) if grouped else None)
            assert got == greedy(found, scores, threshold, limit, groups)


def test_suppression_again_changes_nothing_and_order_does_not_matter():
    found, scores = drawn(300), RNG.permutation(300).astype(np.float32)
    index = kept(found, scores, 0.5, 300)
    assert 1 < len(index) < 300
    assert kept(found[index], scores[index], 0.5, 300) == list(range(len(index)))
    shuffle = RNG.permutation(300)
    assert shuffle[kept(found[shuffle], scores[shuffle], 0.5, 300)].tolist() == index


def test_a_box_is_dropped_only_above_the_threshold_and_by_a_box_that_is_kept():
    found = np.array([[0, 0, 4, 2], [0, 0, 2, 2], [0, 0, 2, 1]], np.float32)  # each has IoU 1/2 with the next
    scores = np.array([3, 2, 1], np.float32)
    assert kept(found, scores, 0.5, 3) == [0, 1, 2]
    assert kept(found, scores, 0.49, 3) == [0, 2]  # the second is dropped, so it does not drop the third
    same = np.repeat(found[:1], 3, axis=0)
    assert kept(same, np.ones(3, np.float32), 0.5, 3) == [0]
    assert kept(same, np.ones(3, np.float32), 0.5, 3, jnp.array([0, 1, 0])) == [0, 1]


def test_nothing_is_kept_of_padding_and_boxes_without_area_suppress_nothing():
    empty = np.zeros((5, 4), np.float32)
    assert kept(empty, np.full(5, -np.inf, np.float32), 0.5, 3) == []
    assert kept(empty, np.full(5, np.nan, np.float32), 0.5, 3) == []
    assert kept(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), 0.5, 3) == []
    assert kept(empty, np.array([1, np.inf, 0, -np.inf, np.nan], np.float32), 0.5, 5) == [1, 0, 2]


def test_a_batch_is_suppressed_image_by_image_and_padding_changes_nothing():
    found, scores = np.stack([drawn(200), drawn(200)]), RNG.random((2, 200)).astype(np.float32)
    scores[1, 150:] = -np.inf
    index, valid = jax.jit(jax.vmap(lambda each, score: boxes.nms(each, score, 0.5, 40)))(
        jnp.asarray(found), jnp.asarray(scores)
    )
    for row in range(2):
        assert index[row][valid[row]].tolist() == kept(found[row], scores[row], 0.5, 40)
    assert kept(found[1, :150], scores[1, :150], 0.5, 40) == kept(found[1], scores[1], 0.5, 40)


def test_suppression_has_one_program_for_any_boxes():
    text = suppress.lower(jnp.zeros((5000, 4)), jnp.zeros(5000), 0.5, 300).as_text()
    assert text.count("stablehlo.while") == 2  # over blocks, and over rounds in one
    assert len(text) < 60_000  # it does not grow with the number of boxes


def test_detections_are_a_tree_of_arrays():
    found = boxes.Detections(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [(2, 3, 4), (2, 3), (2, 3), (2, 3)]
