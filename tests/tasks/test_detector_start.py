"""What a detector may start from: a backbone of a run or a folder, whatever stood on it, and a whole detector."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint.store import Store
from fm_jax.core import statistics, tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.hub import pretrained as public
from fm_jax.models.vision import efficientnet, faster_rcnn
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.faster_rcnn import FasterRCNN
from fm_jax.models.vision.resnet import ResNet
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.tasks import detector_start
from tests.tasks.test_vision import drawn, leave_run

DETECTOR, BASE = faster_rcnn.tiny()
FROZEN = replace(BASE, norm_frozen=True, remat="full")
MODEL = FasterRCNN(DETECTOR, ResNet(FROZEN))
NAMES = ("cat", "dog")
LAYERS = ("logits", "deltas")  # for classes
NET = ResNet(BASE)


@cache
def fresh() -> Any:
    return jax.tree.map(lambda leaf: -leaf, drawn(MODEL, 32))


def equal(got: Any, want: Any) -> None:
    assert tree.flatten(got).keys() == tree.flatten(want).keys()
    jax.tree.map(np.testing.assert_array_equal, got, want)


def doubled(params: Any) -> Any:
    """Return what `leave_run` leaves as its last checkpoint."""
    trained, running = statistics.split(params)
    return tree.merge(jax.tree.map(lambda leaf: 2 * leaf, trained), running)


@pytest.mark.parametrize("kind", ["folder", "classifier", "simclr"])
def test_a_backbone_of_any_source_starts_a_detector(kind: str, tmp_path: Path) -> None:
    module: Any = {"folder": NET, "classifier": ImageClassifier(NET, 3), "simclr": SimCLR(NET, 8)}[kind]
    params = drawn(module)
    if kind == "folder":
        public.save(tmp_path / "source", module, params)
    else:
        leave_run(tmp_path / "source", module, params)
        params = doubled(params)["backbone"]
    given = detector_start.load(tmp_path / "source")
    assert detector_start.form(given, replace(FROZEN, depths=(2, 2))) == FROZEN
    found = detector_start.onto(fresh(), MODEL, given)
    equal(found["backbone"], params)
    for part in ("pyramid", "rpn", "box"):
        equal(found[part], fresh()[part])
    shapes = detector_start.load(tmp_path / "source", shapes=True)
    traced = jax.eval_shape(lambda tree: detector_start.onto(tree, MODEL, shapes), fresh())
    assert jax.tree.map(np.shape, traced) == jax.tree.map(np.shape, found)


@pytest.mark.parametrize("kind", ["folder", "run"])
@pytest.mark.parametrize("classes", [NAMES, ("dog", "cat"), ("cat", "dog", "cow")], ids=["same", "other", "more"])
def test_a_detector_keeps_its_classes_if_they_are_the_same(kind: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    params = drawn(MODEL, 32)
    if kind == "folder":
        public.save(tmp_path / "source", MODEL, params, labels=NAMES)
    else:
        about = {"config": {}, "model": models.describe(MODEL), "classes": list(NAMES)}
        trained, running = statistics.split(params)
        with Store(tmp_path / "source" / "checkpoints", metric="validation/loss", meta=about) as store:
            store.save(1, {"params": trained, "frozen": running}, {}, {})
    given = detector_start.load(tmp_path / "source")
    assert (given.module.cfg, given.labels) == (DETECTOR, NAMES)
    model = MODEL.clone(cfg=replace(DETECTOR, num_classes=len(classes)))
    start = fresh() if len(classes) == 2 else drawn(model, 32)
    found = detector_start.onto(start, model, given, classes)
    own = {name: layer for name, layer in found["box"].items() if name in LAYERS}
    equal(own, {name: (params if classes == NAMES else start)["box"][name] for name in LAYERS})
    for part in (found, params):
        part["box"] = {name: layer for name, layer in part["box"].items() if name not in LAYERS}
    equal(found, params)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    other = ResNet(replace(BASE, norm_epsilon=1e-3, stem="small"))
    public.save(tmp_path / "net", NET, drawn(NET))
    given = detector_start.load(tmp_path / "net")
    with pytest.raises(ConfigError, match=r"stem pooled \(here small\), norm_epsilon 1e-05 \(here 0.001\)"):
        detector_start.onto(fresh(), MODEL.clone(backbone=other), given)
    wide = MODEL.clone(cfg=replace(DETECTOR, width=4))
    public.save(tmp_path / "wide", wide, drawn(wide, 32))
    with pytest.raises(CheckpointError, match="pyramid/lateral1"):
        detector_start.onto(fresh(), MODEL, detector_start.load(tmp_path / "wide"))
    net = efficientnet.EfficientNet(efficientnet.tiny())
    leave_run(tmp_path / "run", ImageClassifier(net, 3), drawn(ImageClassifier(net, 3)))
    with pytest.raises(ConfigError, match="class EfficientNet; a Faster R-CNN starts from a ResNet"):
        detector_start.load(tmp_path / "run")
