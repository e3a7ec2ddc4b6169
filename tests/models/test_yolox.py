from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core import sharding, statistics, tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.vision import yolox
from fm_jax.models.vision.yolox import Raw, detect
from fm_jax.objectives.detection import yolox as objective
from fm_jax.ops import anchor_points
from fm_jax.train import state
from fm_jax.train.step import make_train_step
from tests.close import close
from tests.parity.vision import yolox as drawn

TINY = replace(yolox.tiny(), width=4)
IMAGE = np.random.default_rng(0).normal(size=(4, 32, 64, 3)).astype(np.float32)
AT = anchor_points.points(32, 64, yolox.STRIDES)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("nano", 0.91), ("tiny", 5.06), ("s", 8.968255)]
    + [pytest.param(*more, marks=pytest.mark.slow) for more in (("m", 25.3), ("l", 54.2), ("x", 99.1))],
)
def test_presets_have_the_published_sizes(size, millions):
    model = yolox.YOLOX(getattr(yolox, f"yolox_{size}")())
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    count = tree.count(statistics.split(meta.unbox(shapes))[0])
    digits = len(str(millions).partition(".")[2])
    assert round(count / 1e6, digits) == millions


def test_the_head_begins_sure_of_nothing():
    """Every last bias gives the prior, and boxes begin without a bias of their own."""
    head = jax.jit(yolox.Head(TINY).init)(jax.random.key(0), IMAGE[:, :4, :4])["params"]
    for name in ("object", "class"):
        close(jax.nn.sigmoid(meta.unbox(head[name]["bias"])), TINY.prior)
    assert not meta.unbox(head["box"]["bias"]).any()


def test_remat_changes_no_path_and_computes_again():
    """A convolution on a CPU has a checkpoint of its own, with prevent_cse=False."""
    found = []
    for remat in ("none", "full"):
        stage = yolox.Stage(replace(TINY, remat=remat), 8, 1, last=False)
        shapes = meta.unbox(jax.eval_shape(stage.init, jax.random.key(0), IMAGE)["params"])
        grad = jax.grad(lambda params, stage=stage: stage.apply({"params": params}, IMAGE).sum())
        found.append((tree.flatten(shapes).keys(), "prevent_cse=True" in str(jax.make_jaxpr(grad)(shapes))))
    assert found[0][0] == found[1][0]
    assert [again for _, again in found] == [False, True]


@pytest.mark.slow
def test_bfloat16_is_near_and_returns_float32():
    module, params = drawn.load("yolox")
    whole, half = (
        jax.jit(module.clone(cfg=replace(module.cfg, dtype=dtype)).apply)({"params": params}, IMAGE)
        for dtype in ("float32", "bfloat16")
    )
    for name in Raw._fields:
        got, want = (np.asarray(getattr(raw, name)) for raw in (half, whole))
        assert got.dtype == np.float32 and np.isfinite(got).all()
        assert 0 < np.abs(got - want).max() < 0.2 * np.abs(want).max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(TINY, depth=0), "depth must be at least 1"),
        (lambda: replace(TINY, prior=1.0), r"prior must be in \(0, 1\)"),
        (lambda: replace(TINY, norm_momentum=1.0), "norm_momentum in"),
        (lambda: yolox.YOLOX(TINY).init(jax.random.key(0), IMAGE[..., :1]), r"images must be \[B, H, W, 3\]"),
        (lambda: yolox.YOLOX(TINY).init(jax.random.key(0), IMAGE[:, :24]), "24 × 64 are not multiples of"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_predictions_become_objects():
    """Of two boxes of one class that overlap the better is kept; another class's is; an unlikely one is not."""
    boxes = np.array([[4, 4, 20, 20], [5, 4, 21, 20], [4, 4, 20, 20], [30, 8, 60, 30], [30, 8, 60, 31]], np.float32)
    labels, sure = [0, 0, 2, 1, 1], np.array([0.9, 0.8, 0.7, 0.6, 0.005])
    raw = Raw(
        np.zeros((2, len(AT.cell), 4), np.float32),
        np.full((2, len(AT.cell)), -30, np.float32),
        np.full((2, len(AT.cell), 3), -30, np.float32),
    )
    for place, (box, label, p) in enumerate(zip(boxes, labels, sure, strict=True)):
        where = 3 * place
        raw.boxes[0, where] = anchor_points.encode(np.tile(box, (len(AT.cell), 1)), AT)[where]
        raw.objectness[0, where], raw.classes[0, where, label] = np.log(p / (1 - p)), 30
    found_by = jax.jit(partial(detect, size=(32, 64), limit=4))
    found = found_by(raw, score=0.01, overlap=0.65)
    assert found.valid.tolist() == [[True, True, True, False], [False] * 4]
    close(found.boxes[0, :3], boxes[[0, 2, 3]])
    close(found.scores[0, :3], sure[[0, 2, 3]])
    assert found.classes[0, :3].tolist() == [0, 2, 1] and found.classes.dtype == jnp.int32
    assert not found.boxes[0, 3:].any() and not found.scores[1].any()
    assert found_by(raw, score=0.65, overlap=0.65).valid.sum() == 2
    assert found_by(raw, score=0.01, overlap=0.95).valid.sum() == 4


@pytest.mark.slow
def test_it_learns_one_batch_on_a_mesh_and_keeps_an_average():
    """Split over devices, with images and boxes of padding; the average of the weights detects."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = yolox.YOLOX(replace(TINY, width=8))
    rng = np.random.default_rng(1)
    boxes = np.zeros((8, 3, 4), np.float32)
    images = rng.normal(0, 0.1, (8, 32, 64, 3)).astype(np.float32)
    for row in range(7):
        left, top = rng.integers(2, 40), rng.integers(2, 12)
        boxes[row, 0] = (left, top, left + 16, top + 16)
        images[row, top : top + 16, left : left + 16, row % 3] += 2
    labels = np.pad(np.arange(8)[:, None] % 3, [(0, 0), (0, 2)]).astype(np.int32)
    batch = {
        "images": images, "boxes": boxes, "labels": labels,
        "box_mask": np.arange(3) < np.array([[1]] * 7 + [[0]]), "weights": np.array([1] * 6 + [0, 1], np.float32),
    }  # fmt: skip
    params = state.init_params(model, [images], jax.random.key(0), mesh)
    tx = optax.adam(3e-3)
    now = state.place(lambda p, frozen: state.create(p, tx, frozen=frozen, ema=True), *statistics.split(params), mesh)
    step = make_train_step(objective.yolox(model.apply, l1_from=0), tx, key=jax.random.key(1), ema_decay=0.9)
    losses = []
    with jax.set_mesh(mesh):
        batch, step = jax.device_put(batch, sharding.batch_sharding(mesh)), jax.jit(step)
        for _ in range(60):
            now, metrics = step(now, batch)
            losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.3 * losses[0], losses[::10]
    averaged = tree.merge(now.ema, now.frozen)
    found = detect(jax.jit(model.apply)({"params": averaged}, images[:6]), (32, 64))
    assert all(np.isfinite(part).all() for part in found)
