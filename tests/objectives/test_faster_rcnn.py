from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import statistics, tree
from fm_jax.core.errors import ConfigError
from fm_jax.models.vision import faster_rcnn as models
from fm_jax.models.vision.resnet import ResNet
from fm_jax.objectives.detection import faster_rcnn as objective
from fm_jax.objectives.detection.faster_rcnn import Config, Samples, balanced, match
from fm_jax.ops import boxes as box_ops
from tests.close import about, close

CFG, BASE = models.tiny()
MODEL = models.FasterRCNN(CFG, ResNet(BASE))
LOSS = Config(anchors=32, proposals=16)
RNG = np.random.default_rng(0)
CORNER = RNG.uniform(0, 16, (4, 3, 2))
MASK = np.array([[True, True, False], [False] * 3, [True] * 3, [True, False, False]])
IMAGES = RNG.normal(size=(4, 32, 32, 3)).astype(np.float32)
BOXES = np.concatenate([CORNER, CORNER + RNG.uniform(5, 16, (4, 3, 2))], axis=2)
BATCH = {
    "images": IMAGES,
    "boxes": np.where(MASK[..., None], BOXES, 0).astype(np.float32),
    "labels": np.where(MASK, RNG.integers(0, 2, (4, 3)), 0).astype(np.int32),
    "box_mask": MASK,
    "weights": np.ones(4, np.float32),
}  # fmt: skip


@cache
def params():
    fresh = jax.jit(lambda: meta.unbox(MODEL.init(jax.random.key(0), BATCH["images"])["params"]))()
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32), fresh)


@jax.jit
def program(params, batch, rng):
    """Return (Loss, gradient of its sum) in evaluation, which leaves the running statistics alone, or in training."""
    loss = objective.faster_rcnn(MODEL.apply, LOSS)
    trained, running = statistics.split(params)

    def total(trained):
        found = loss(tree.merge(trained, running), batch, rng, None)
        return found.sum, found

    gradient, found = jax.grad(total, has_aux=True)(trained)
    return found, gradient


def run(batch, rng=None):
    return program(params(), batch, rng)


def rows(chosen):
    return {name: field[chosen] for name, field in BATCH.items()}


def test_the_terms_are_a_plain_oracles():
    """Of samples that are given: cross-entropy and smooth L1, by hand."""
    index = np.array([[3, 9, 40, 41], [0, 5, 6, 7], [20, 3, 60, 8], [50, 2, 3, 100]])
    positive = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], bool)
    valid = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]], bool)
    count = CFG.proposals[0]
    second = np.array([[count, count + 1, 0, 1], [0, 1, 2, 0], [count + 2, 0, 1, 2], [count, 0, 1, 2]])
    given = [
        lambda *_, at=at: Samples(jnp.asarray(at), jnp.asarray(positive), jnp.asarray(valid)) for at in (index, second)
    ]
    loss = objective.faster_rcnn(MODEL.apply, LOSS, samplers=tuple(given))
    found = jax.jit(lambda params: loss(params, BATCH, None, None))(params())
    regions = jax.jit(lambda p: MODEL.apply({"params": p}, BATCH["images"], train=True, method="regions"))(params())
    _, which, _ = match(regions.anchors[None], BATCH["boxes"], MASK, 0.7, 0.3, best=True)
    candidates = np.concatenate([regions.proposals, BATCH["boxes"]], axis=1)
    rois = np.stack([np.where(valid[n][:, None], candidates[n][second[n]], 0) for n in range(4)])
    classify = jax.jit(lambda p, maps: MODEL.apply({"params": p}, maps, rois, (32, 32), method="classify"))
    logits, refined = jax.device_get(classify(params(), regions.maps))
    regions = jax.device_get(regions)

    def smooth(deltas, target):
        error = np.abs(np.asarray(deltas) - np.asarray(target))
        return np.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18).sum()

    want = dict.fromkeys(("objectness", "anchor_boxes", "classes", "boxes"), 0.0)
    for n, s in zip(*np.nonzero(valid), strict=True):
        anchor, logit = index[n, s], float(regions.objectness[n, index[n, s]])
        want["objectness"] += np.log1p(np.exp(-logit if positive[n, s] else logit)) / 32
        label = 0
        if positive[n, s]:
            box = BATCH["boxes"][n, which[n, anchor]]
            target = box_ops.encode(box, regions.anchors[anchor])
            want["anchor_boxes"] += smooth(regions.deltas[n, anchor], target) / 32
            own = second[n, s] - count  # an object as a proposal is matched to itself
            label = int(BATCH["labels"][n, own]) + 1
            want["boxes"] += smooth(refined[n, s, label], np.zeros(4)) / 16
        want["classes"] += float(jax.nn.logsumexp(logits[n, s]) - logits[n, s, label]) / 16
    close(found.metrics, {**found.metrics, **{name: (np.float32(value), 4.0) for name, value in want.items()}}, 1e-5)
    close(found.sum, sum(want.values()), 1e-5)
    assert found.weight == 4


def test_padding_changes_nothing_bit_for_bit():
    """More padded rows, and other numbers in them; the last row of weight 0 may hold anything."""
    rng = jax.random.key(3)
    plain = run(BATCH, rng)
    wide = {
        name: np.concatenate([BATCH[name], np.zeros_like(BATCH[name])[:, :2]], axis=1)
        for name in ("boxes", "labels", "box_mask")
    }
    wide["boxes"] = np.where(wide["box_mask"][..., None], wide["boxes"], 7.0)
    wide["labels"] = np.where(wide["box_mask"], wide["labels"], 1)
    jax.tree.map(np.testing.assert_array_equal, run({**BATCH, **wide}, rng), plain)


def test_rows_of_weight_zero_count_nowhere():
    weights = np.array([1, 1, 1, 0], np.float32)
    odd = np.concatenate([BATCH["boxes"][:3], np.full((1, 3, 4), np.nan, np.float32)])
    first = run({**BATCH, "weights": weights})
    second = run({**BATCH, "weights": weights, "boxes": odd})
    jax.tree.map(np.testing.assert_array_equal, first[0].metrics, second[0].metrics)
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
    assert first[0].weight == 3


def test_images_without_objects_have_a_finite_loss_without_box_terms():
    empty = {**BATCH, "box_mask": np.zeros_like(MASK), "boxes": np.zeros_like(BATCH["boxes"])}
    found, gradient = run(empty, jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, gradient)))
    assert found.metrics["boxes"][0] == found.metrics["anchor_boxes"][0] == 0
    assert found.sum > 0
    assert found.metrics["recall"] == (0, 0)
    nowhere = BATCH["boxes"][:, :0]
    none = match(regions := BATCH["boxes"], nowhere, MASK[:, :0], 0.7, 0.3, best=True)
    assert not any(part.any() for part in none[:2]) and none[2].shape == (4, 0, regions.shape[1])


def test_the_parts_of_a_batch_add_up_to_the_whole():
    """Given the same samples: an image's loss does not depend on what it is batched with."""

    def first_come(kinds, priorities, count, positives):
        return balanced(kinds, -jnp.broadcast_to(jnp.arange(kinds.shape[1]) / 1e4, kinds.shape) + 1, count, positives)

    loss = objective.faster_rcnn(MODEL.apply, LOSS, samplers=(first_come, first_come))
    sums = jax.jit(lambda params, batch: loss(params, batch, None, None)[:2])
    halves = jax.tree.map(jnp.add, sums(params(), rows(slice(0, 2))), sums(params(), rows(slice(2, 4))))
    close(halves, sums(params(), BATCH), 1e-5)


def test_training_draws_anew_and_moves_the_running_statistics():
    first, second = (run(BATCH, jax.random.key(seed))[0] for seed in (0, 1))
    assert first.sum != second.sum
    running = tree.flatten(statistics.split(params())[1])
    assert first.updates.keys() == running.keys()
    assert not run(BATCH)[0].updates
    assert run(BATCH)[0].sum == run(BATCH)[0].sum


def test_matching_marks_good_and_best_boxes():
    objects = np.array([[[0, 0, 10, 10], [20, 20, 24, 24], [0, 0, 10, 10]]], np.float32)
    mask = np.array([[True, True, False]])
    boxes = np.array(
        [[[0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2], [18, 18, 26, 26], [18, 18, 26, 26], [50, 50, 60, 60]]],
        np.float32,
    )
    kinds, which, overlap = match(boxes, objects, mask, 0.7, 0.3)
    assert kinds.tolist() == [[1, -1, 0, 0, 0, 0]]
    kinds, which, overlap = match(boxes, objects, mask, 0.7, 0.3, best=True)
    assert kinds.tolist() == [[1, -1, 0, 1, 1, 0]]  # two are equally good for the second object
    assert which[0, :5].tolist() == [0, 0, 0, 1, 1]
    close(overlap[0, 0, :3], np.array([0.8, 0.5, 0.2], np.float32))
    assert (overlap[0, 2] == -1).all()
    far = np.array([[[70, 70, 80, 80], [0, 0, 0, 0], [0, 0, 0, 0]]], np.float32)
    assert not match(boxes, far, mask, 0.7, 0.3, best=True)[0].any()  # nothing touches it


def test_samples_are_balanced_and_random():
    kinds = np.array([[1] * 10 + [0] * 40 + [-1] * 50, [1] * 2 + [0] * 5 + [-1] * 93, [-1] * 100])
    for seed in range(3):
        drawn = jax.random.uniform(jax.random.key(seed), kinds.shape)
        found = balanced(kinds, drawn, 16, 4)
        assert found.places.shape == (3, 20)
        assert found.positive.sum(axis=1).tolist() == [4, 2, 0]
        assert found.valid.sum(axis=1).tolist() == [16, 7, 0]
        picked = np.take_along_axis(kinds, np.asarray(found.places), axis=1)
        assert (picked[found.valid] == np.asarray(found.positive)[found.valid]).all()
        for row in range(2):
            chosen = np.asarray(found.places[row])[np.asarray(found.valid[row])]
            assert len(set(chosen.tolist())) == len(chosen)
    counts = np.zeros(10)
    for seed in range(200):
        found = balanced(kinds[:1], jax.random.uniform(jax.random.key(seed), (1, 100)), 16, 4)
        counts[np.asarray(found.places)[np.asarray(found.positive)]] += 1
    for count in counts:  # each of ten is one of four
        about(count / 200, 0.4, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.8}, "low 0.8 and high 0.7 must be in"),
        ({"anchors": 0}, "anchors must be at least 1"),
        ({"proposal_positives": 0.0}, "proposal_positives must be in"),
        ({"beta": 0.0}, "beta 0.0 and box_weights"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(Config(), **change)


def test_the_deltas_of_proposals_have_the_models_weights():
    assert Config().box_weights == models.WEIGHTS
