from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import statistics, tree
from fm_jax.core.errors import ConfigError
from fm_jax.models.vision import yolov3
from fm_jax.models.vision.yolov3 import Config, Outputs, YOLOv3
from tests.close import close

TINY = yolov3.tiny()
POOLED = Config((4, 8, 16, 16), (), (16, 8), TINY.anchors, 4, image_size=(8, 8))
X = np.random.default_rng(0).uniform(size=(3, 16, 8, 3)).astype(np.float32)


@cache
def init(cfg):
    """Return parameters with every leaf moved, so that no bias is zero."""
    fresh = jax.jit(lambda key: meta.unbox(YOLOv3(cfg).init(key, X)["params"]))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.uniform(0, 0.2, leaf.shape).astype(np.float32), fresh)


@cache
def forward(cfg):
    return jax.jit(lambda params, image: YOLOv3(cfg).apply({"params": params}, image))


@pytest.mark.parametrize(
    ("preset", "count", "candidates"),
    [
        (yolov3.yolov3, 61_949_149, 10_647),
        (yolov3.yolov3_spp, 62_998_749, 22_743),
        (yolov3.yolov3_tiny, 8_852_366, 2_535),
    ],
)
def test_presets_have_the_published_sizes(preset, count, candidates):
    cfg = preset()
    image = jax.ShapeDtypeStruct((1, *cfg.image_size, 3), np.float32)
    out, made = jax.eval_shape(lambda x: YOLOv3(cfg).init_with_output(jax.random.key(0), x), image)
    assert tree.count(statistics.split(meta.unbox(made["params"]))[0]) == count
    assert [part.shape for part in out] == [(1, candidates, 4), (1, candidates), (1, candidates, 80)]


@pytest.mark.parametrize("cfg", [TINY, POOLED], ids=["residual", "pooled"])
def test_every_scale_has_its_cells(cfg):
    assert cfg.strides == (4, 2)
    out = forward(cfg)(init(cfg), X)
    assert out.boxes.shape == (3, 2 * (4 * 2 + 8 * 4), 4) and out.boxes.dtype == jnp.float32
    assert out.classes.shape == (3, 80, 4)
    boxes, scores = yolov3.decode(cfg, out, (16, 8))
    column, row, anchor = 1, 2, 1
    number = 2 * 4 * 2 + (row * 4 + column) * 2 + anchor  # in the second scale
    t = np.asarray(out.boxes[0, number], float)
    centre = (1 / (1 + np.exp(-t[:2])) + (column, row)) * 2
    side = np.exp(t[2:]) * cfg.anchors[1][anchor]
    close(boxes[0, number], np.concatenate([centre - side / 2, centre + side / 2]))
    logits = np.asarray(out.classes[0, number], float)
    close(scores[0, number], 1 / (1 + np.exp(-float(out.objectness[0, number]))) / (1 + np.exp(-logits)))


def test_a_cell_sees_its_own_part_of_the_image():
    """What is predicted in a cell changes most with the pixels of that cell: scales are not turned or mixed up."""
    cfg, column, row = TINY, 1, 3
    number = 2 * 4 * 2 + (row * 4 + column) * 2

    def score(image):
        return forward(cfg)(init(cfg), image[None]).objectness[0, number]

    slope = np.abs(jax.grad(score)(jnp.asarray(X[0]))).sum(axis=-1)  # [16, 8]
    rows, columns = np.mgrid[:16, :8]
    centre = ((slope * rows).sum() / slope.sum(), (slope * columns).sum() / slope.sum())
    assert np.abs(np.array(centre) - (row * 2 + 0.5, column * 2 + 0.5)).max() < 2


def test_the_last_pooling_of_the_pooled_form_keeps_the_size_and_pads_with_less_than_everything():
    stage = yolov3.Stage(POOLED, 3)
    x = -1 - np.random.default_rng(0).uniform(size=(1, 3, 3, 16)).astype(np.float32)
    seen = {}

    def layer(cfg, features, size, axes, name):
        return lambda pooled: seen.setdefault("pooled", pooled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yolov3, "Layer", layer)
        stage.apply({}, x)
    want = np.stack([[x[0, r : r + 2, c : c + 2].max(axis=(0, 1)) for c in range(3)] for r in range(3)])
    np.testing.assert_array_equal(seen["pooled"][0], want)


def test_training_moves_the_running_statistics():
    _, new = jax.jit(lambda p: YOLOv3(TINY).apply({"params": p}, X, mutable=["statistics"]))(init(TINY))
    running = tree.flatten(statistics.split(init(TINY))[1])
    assert tree.flatten(new["statistics"]).keys() == running.keys()
    old, moved = running["stem/norm/mean"], tree.flatten(new["statistics"])["stem/norm/mean"]
    assert 0 < np.abs(moved - old).max() < 0.05


@pytest.mark.parametrize("cfg", [TINY, POOLED], ids=["residual", "pooled"])
def test_remat_computes_again_and_keeps_the_parameters(cfg):
    def traced(cfg):
        def score(params):
            return sum(jnp.square(part).sum() for part in YOLOv3(cfg).apply({"params": params}, X))

        return str(jax.make_jaxpr(jax.grad(score))(init(TINY if cfg.depths else POOLED)))

    programs = [traced(replace(cfg, remat=remat)) for remat in ("full", "none")]
    assert ["nothing_saveable" in program for program in programs] == [True, False]


def test_half_precision_stays_near():
    cfg = replace(TINY, dtype="bfloat16")
    got, want = forward(cfg)(init(TINY), X), forward(TINY)(init(TINY), X)
    assert got.classes.dtype == jnp.float32
    for name in Outputs._fields:
        near, exact = np.asarray(getattr(got, name)), np.asarray(getattr(want, name))
        assert 0 < np.abs(near - exact).max() < 0.15 * max(1.0, np.abs(exact).max())


def test_detections_are_darknets():
    """Every (box, class) above the threshold, the best first, unless a better one of its class overlaps it too much."""
    cfg, size = replace(TINY, num_classes=3), (16, 8)
    rng = np.random.default_rng(0)
    drawn = [
        rng.normal(0, spread, (2, 80, *more)).astype(np.float32) for spread, more in ((1, (4,)), (2, ()), (2, (3,)))
    ]
    drawn[0] += [0, 0, 0.7, 0.7]  # large enough to overlap
    out = Outputs(*drawn)
    boxes, scores = (np.asarray(part) for part in yolov3.decode(cfg, out, size))
    detect = jax.jit(lambda out: yolov3.detect(cfg, out, size, score=0.3, overlap=0.4, limit=20))
    found = detect(out)
    nothing = detect(out._replace(objectness=np.full((2, 80), -20, np.float32)))
    assert not any(part.any() for part in nothing)

    def iou(a, b):
        shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
        return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)

    for image in range(2):
        kept = []
        pairs = sorted(np.argwhere(scores[image] > 0.3).tolist(), key=lambda pair: -scores[image][tuple(pair)])
        for number, kind in pairs:
            box = boxes[image, number].astype(float)
            if all(other != kind or iou(boxes[image, n].astype(float), box) <= 0.4 for n, other in kept):
                kept.append((number, kind))
        assert len({number for number, _ in kept}) < len(kept) < len(pairs)  # a box of two classes; suppressed ones
        count = int(found.valid[image].sum())
        assert found.valid[image, :count].all() and count == min(20, len(kept))
        assert found.classes[image, :count].tolist() == [kind for _, kind in kept[:count]]
        np.testing.assert_array_equal(found.boxes[image, :count], [boxes[image, number] for number, _ in kept[:count]])
        np.testing.assert_array_equal(found.scores[image, :count], [scores[image][pair] for pair in kept[:count]])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"widths": ()}, "widths is empty"),
        ({"depths": (1,)}, "depths"),
        ({"depths": (1, 0)}, "depths must be at least 1"),
        ({"head_widths": (16, 7)}, "must be even"),
        ({"widths": (8, 9, 16)}, "must be even"),
        ({"head_widths": (16, 8, 8), "anchors": (*TINY.anchors, TINY.anchors[0])}, "2 halvings"),
        ({"anchors": TINY.anchors[:1]}, "anchors"),
        ({"anchors": (TINY.anchors[0], ((0.0, 3.0),))}, "above 0"),
        ({"pools": (4,)}, "odd"),
        ({"depths": (), "pools": (3,), "head_widths": (16,), "anchors": TINY.anchors[:1]}, "pools"),
        ({"image_size": (10, 8)}, "multiples of 4"),
        ({"num_classes": 0}, "num_classes"),
        ({"norm_momentum": 1.0}, "norm_momentum"),
    ],
)
def test_an_impossible_config_is_refused(change, word):
    with pytest.raises(ConfigError, match=word):
        replace(TINY, **change)


def test_images_of_another_size_or_number_of_channels_are_refused():
    for shape, word in (((1, 10, 8, 3), "multiples of 4"), ((1, 8, 8, 1), "in_channels")):
        with pytest.raises(ConfigError, match=word):
            jax.eval_shape(YOLOv3(TINY).init, jax.random.key(0), np.zeros(shape, np.float32))
