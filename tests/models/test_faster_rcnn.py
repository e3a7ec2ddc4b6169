from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.checkpoint import surgery
from fm_jax.core import statistics, tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.models.vision import faster_rcnn, resnet
from fm_jax.models.vision.faster_rcnn import Config, FasterRCNN, Outputs, detect
from fm_jax.models.vision.resnet import ResNet
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.ops import boxes as box_ops
from tests.close import close

CFG, BASE = faster_rcnn.tiny()
MODEL = FasterRCNN(CFG, ResNet(BASE))
IMAGE = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def shapes(model, side=64):
    image = np.zeros((1, side, side, 3), np.float32)
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))["params"]


@cache
def params():
    fresh = jax.jit(lambda: meta.unbox(MODEL.init(jax.random.key(0), IMAGE)["params"]))()
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32), fresh)


@pytest.mark.parametrize(("preset", "count"), [(faster_rcnn.resnet50_fpn, 41_808_406), (faster_rcnn.scenes, 895_043)])
def test_presets_have_the_published_and_the_stated_size(preset, count):
    """torchvision's number is with trained scales and biases, as ours counts them."""
    cfg, base = preset()
    assert tree.count(statistics.split(shapes(FasterRCNN(cfg, ResNet(base)), 128))[0]) == count


@pytest.mark.parametrize("source", ["backbone", "simclr"])
def test_a_backbone_that_was_trained_before_starts_a_detector(source):
    """The paths are those of a classifier and of SimCLR: the rest stays fresh, and nothing else is accepted."""
    bare = ResNet(BASE) if source == "backbone" else SimCLR(ResNet(BASE), 8)
    trained = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes(bare))
    given = {"backbone": trained if source == "backbone" else trained["backbone"]}
    fresh = ("pyramid/.*", "rpn/.*", "box/.*")
    found = surgery.load(params(), given, fresh=fresh)
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(found["backbone"]))
    for name in ("pyramid", "rpn", "box"):
        jax.tree.map(np.testing.assert_array_equal, found[name], params()[name])
    other = shapes(ResNet(replace(BASE, depths=(1, 2))))
    with pytest.raises(CheckpointError, match="stage2/block1"):
        surgery.load(
            params(), {"backbone": jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), other)}, fresh=fresh
        )


def test_frozen_norms_do_not_move_and_have_no_gradient():
    frozen = MODEL.clone(backbone=ResNet(replace(BASE, norm_frozen=True)))

    def total(params):
        out, new = frozen.apply({"params": params}, IMAGE, train=True, mutable=["statistics"], method="regions")
        return jnp.square(out.objectness).sum(), (out.objectness, new)

    slope, (scores, new) = jax.jit(jax.grad(total, has_aux=True))(params())
    assert not new
    for path, leaf in tree.flatten(slope["backbone"]).items():
        assert leaf.any() != ("norm" in path), path
    live, moved = jax.jit(lambda p: MODEL.apply({"params": p}, IMAGE, mutable=["statistics"], method="regions"))(
        params()
    )
    assert len(tree.flatten(moved["statistics"])) == 12
    assert np.abs(live.objectness - scores).max() > 1e-2


def test_half_precision_computes_nearly_the_same_and_returns_float32():
    half = MODEL.clone(backbone=ResNet(replace(BASE, dtype="bfloat16")))
    regions = [jax.jit(lambda p, m=m: m.apply({"params": p}, IMAGE, method="regions"))(params()) for m in (MODEL, half)]
    assert regions[1].maps[0].dtype == jnp.bfloat16
    assert {x.dtype for x in regions[1][1:]} == {jnp.dtype("float32"), jnp.dtype(bool)}
    close(regions[1].objectness, regions[0].objectness, 0.2)


def oracle(cfg, logits, refined, proposals, size):
    """Detect in one image, class by class."""
    logits = np.asarray(logits, float)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = []
    for label in range(1, scores.shape[1]):
        boxes = np.asarray(box_ops.decode(refined[:, label], proposals, faster_rcnn.WEIGHTS))
        boxes = np.clip(boxes, 0, [size[1], size[0]] * 2)
        alive = [
            n
            for n in np.argsort(-scores[:, label])
            if scores[n, label] > cfg.score and (boxes[n, 2:] - boxes[n, :2] >= 0.01).all()
        ]
        while alive:
            best, *alive = alive
            found.append((scores[best, label], label - 1, boxes[best]))
            alive = [n for n in alive if float(box_ops.iou(boxes[n], boxes[best])) <= cfg.overlap]
    return sorted(found, key=lambda each: -each[0])[: cfg.detections]


def drawn(count=12, classes=4):
    rng = np.random.default_rng(2)
    corner = rng.uniform(0, 40, (2, count, 2))
    proposals = np.concatenate([corner, corner + rng.uniform(4, 30, (2, count, 2))], axis=2).astype(np.float32)
    valid = np.ones((2, count), bool)
    valid[1, 5:] = False
    logits, refined = rng.normal(0, 2, (2, count, classes)), rng.normal(0, 2, (2, count, classes, 4))
    nothing = np.zeros((2, 0), np.float32)
    return Outputs(nothing, nothing, proposals, valid, logits.astype(np.float32), refined.astype(np.float32))


def test_detections_are_a_plain_oracles():
    outputs, cfg = drawn(), replace(CFG, num_classes=3, detections=9)
    found = jax.jit(lambda outputs: detect(cfg, outputs, (48, 64)))(outputs)
    for image in range(2):
        real = outputs.valid[image]
        want = oracle(
            cfg, *(part[image][real] for part in (outputs.logits, outputs.refined, outputs.proposals)), (48, 64)
        )
        assert found.valid[image].sum() == len(want) > 3
        assert found.classes[image][: len(want)].tolist() == [label for _, label, _ in want]
        close(found.scores[image][: len(want)], np.array([score for score, _, _ in want]))
        close(found.boxes[image][: len(want)], np.stack([box for *_, box in want]))
    assert not np.asarray(found.boxes)[~np.asarray(found.valid)].any()


def test_what_stands_in_places_without_a_proposal_changes_nothing():
    outputs, cfg = drawn(), replace(CFG, num_classes=3)
    odd = [np.where(outputs.valid.reshape(2, 12, *[1] * (part.ndim - 2)), part, 3.0) for part in outputs[4:]]
    other = outputs._replace(logits=odd[0].astype(np.float32), refined=odd[1].astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, detect(cfg, other, (48, 64)), detect(cfg, outputs, (48, 64)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(CFG, num_classes=0), "num_classes must be at least 1"),
        (lambda: replace(CFG, anchor_sizes=(8.0, 0.0, 1.0)), "anchor_sizes must be finite and above 0"),
        (lambda: replace(CFG, proposals=(8, 0)), r"proposals must be at least 1, not \(8, 0\)"),
        (lambda: replace(CFG, overlap=1.5), r"overlap must be in \[0, 1\]"),
        (lambda: replace(CFG, canonical=0.0), "canonical must be finite"),
        (
            lambda: shapes(FasterRCNN(Config(3), ResNet(BASE))),
            "must have 3 entries, one more than the backbone's stages",
        ),
        (lambda: shapes(FasterRCNN(CFG, ResNet(replace(BASE, in_channels=1)))), r"images must be \[B, H, W, 1\]"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_stages_of_a_backbone_are_read_at_their_strides():
    maps = jax.eval_shape(
        lambda: ResNet(resnet.resnet18()).init_with_output(jax.random.key(0), np.zeros((1, 64, 96, 3)), method="maps")
    )[0]
    assert [x.shape for x in maps] == [(1, 16, 24, 64), (1, 8, 12, 128), (1, 4, 6, 256), (1, 2, 3, 512)]
