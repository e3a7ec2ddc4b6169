"""Detectors: what a training starts from, and what is refused before any compilation."""

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data.boxes import pipeline, scenes
from fm_jax.data.boxes.record import Objects, Record
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import faster_rcnn, resnet, yolov3, yolox
from fm_jax.models.vision.faster_rcnn import FasterRCNN
from fm_jax.models.vision.yolov3 import YOLOv3
from fm_jax.models.vision.yolox import YOLOX
from fm_jax.objectives.detection import yolox as objective
from fm_jax.tasks import detection, detector
from fm_jax.tasks.detection import Opened
from fm_jax.tasks.init import Init
from fm_jax.train import loop

NAMES = ("cat", "dog", "hen")
HEAD, BASE = faster_rcnn.tiny()
DETECTORS: list[tuple[Any, int]] = [
    (YOLOX(yolox.tiny()), 32),
    (YOLOv3(yolov3.tiny()), 8),
    (FasterRCNN(HEAD, resnet.ResNet(BASE)), 32),
]


@cache
def shapes(module: Any, side: int) -> Any:
    image = np.zeros((1, side, side, 3), np.float32)
    return jax.eval_shape(lambda: meta.unbox(module.init(jax.random.key(0), image)["params"]))


def filled(module: Any, side: int, value: float) -> Any:
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes(module, side))


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["yolox", "yolov3"])
def test_only_what_has_a_row_for_each_class_starts_randomly_for_other_classes(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    module, side = DETECTORS[number]
    fresh, old = filled(module, side, 0.0), filled(module, side, 1.0)
    same = detection.onto(fresh, module, Pretrained(module, old, None, NAMES), NAMES)
    assert all(leaf.min() == 1 for leaf in jax.tree.leaves(same))
    other = type(module)(replace(module.cfg, num_classes=7))
    with caplog.at_level(logging.INFO):
        found = detection.onto(fresh, module, Pretrained(other, filled(other, side, 1.0), None), NAMES)
    assert "other classes" in caplog.text
    kept = {path for path, leaf in tree.flatten(found).items() if not leaf.any()}
    changed = {
        path
        for path, leaf in tree.flatten(shapes(other, side)).items()
        if leaf.shape != tree.flatten(shapes(module, side))[path].shape
    }
    assert kept == changed and kept


def test_a_run_of_another_kind_cannot_start_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Opened(DETECTORS[1][0], {}, (), None)
    monkeypatch.setattr(detection, "load", lambda *_: given)
    with pytest.raises(ConfigError, match="has a YOLOv3, from which a YOLOX cannot start"):
        detection.start_of(Init(Path("runs/x")), DETECTORS[0][0], tmp_path)
    assert detection.start_of(Init(), DETECTORS[0][0], tmp_path) is None
    with pytest.raises(CheckpointError, match="ResNet, which finds no objects"):
        detection.detector(Opened(resnet.ResNet(BASE), {}, (), None), Path("x"))


@pytest.mark.parametrize(("module", "side"), DETECTORS, ids=lambda value: type(value).__name__)
def test_a_public_folder_has_its_authors_preprocessing_and_a_run_its_own(module: Any, side: int) -> None:
    bare = Opened(module, {}, (), None)
    how = detection.preprocessing(bare, Path("x"))
    assert how.size == {YOLOX: (416, 416), YOLOv3: (8, 8), FasterRCNN: (1344, 1344)}[type(module)]
    own = pipeline.Config(size=(96, 64))
    assert detection.preprocessing(bare.__class__(module, {}, (), own), Path("x")) == own
    count = detection.count_classes(module)
    assert detection.named(bare, (), Path("x")) == tuple(f"class {number}" for number in range(count))
    assert detection.named(Opened(module, {}, NAMES, None), (), Path("x")) == NAMES
    with pytest.raises(ConfigError, match=f"classes names 1 .*the detector has {count}"):
        detection.named(bare, ("cat",), Path("x"))


def test_detections_have_one_form_whatever_the_detector() -> None:
    raw = {"boxes": (21, 4), "objectness": (21,), "classes": (21, 3)}
    image = {"images": jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)}
    outputs = [yolox.Raw(**{name: np.zeros((2, *shape), np.float32) for name, shape in raw.items()})]
    found = [yolox.detect(outputs[0], (32, 32), limit=6)]
    cfg = yolov3.tiny()
    count = sum(len(pairs) * (8 // stride) ** 2 for stride, pairs in zip(cfg.strides, cfg.anchors, strict=True))
    shapes3 = (count, 4), (count,), (count, cfg.num_classes)
    found.append(yolov3.detect(cfg, yolov3.Outputs(*(np.zeros((2, *shape), np.float32) for shape in shapes3)), (8, 8)))
    rcnn = DETECTORS[2][0]
    found.append(jax.eval_shape(detection.finder(rcnn), shapes(rcnn, 32), image))
    for one in found:
        assert [part.dtype for part in one] == [np.float32, np.float32, np.int32, np.bool_]
        assert one.boxes.shape == (*one.scores.shape, 4) and one.valid.shape == one.classes.shape == one.scores.shape


def config(**options: Any) -> detector.Config:
    source = scenes.Config(side=32, kinds=3, train=10, validation=2, test=2)
    return detector.Config(
        data=pipeline.Config(source, (32, 32), max_boxes=4),
        fit=loop.FitConfig(2),
        learning_rate=1e-3,
        batch_size=8,
        **options,
    )


def setup(cfg: detector.Config, workdir: Path, model: Any = DETECTORS[0][0]) -> detector.Setup:
    return detector.Setup(model, objective.yolox(model.apply), cfg, workdir)


def test_settings_that_do_not_fit_are_refused_before_compilation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the data has 3 classes, the model 5; set model.num_classes 3"):
        setup(config(), tmp_path, YOLOX(replace(yolox.tiny(), num_classes=5)))
    with pytest.raises(ConfigError, match="frozen pattern 'stem/nothing' matches no trained parameter"):
        setup(config(frozen=("stem/nothing",)), tmp_path)
    with pytest.raises(ConfigError, match="drop_at must be shares"):
        config(drop_at=(1.5,))
    with pytest.raises(ConfigError, match="ema_decay"):
        config(ema_decay=1.0)
    with pytest.raises(ConfigError, match="final_ratio"):
        config(final_ratio=2.0)


def test_frozen_parameters_are_not_trained(tmp_path: Path) -> None:
    trained, still = jax.eval_shape(setup(config(frozen=("stem/.*",)), tmp_path).start)
    assert not any(path.startswith("stem/") for path in tree.flatten(trained))
    assert {"stem/conv/kernel", "stem/norm/scale", "stem/norm/mean"} <= tree.flatten(still).keys()


def test_training_images_are_measured_in_part_and_all_others_whole(tmp_path: Path) -> None:
    made = setup(config(measured=4), tmp_path)
    assert made.numbers("train") == [0, 2, 5, 7] and made.numbers("test") == [0, 1]
    rows = [(batch["index"], batch["weights"]) for batch in made.batches("train")]
    seen = [int(index) for numbers, weights in rows for index in np.asarray(numbers)[np.asarray(weights) > 0]]
    assert seen == made.numbers("train")


def test_crowds_and_difficult_objects_are_ignored_and_areas_are_those_of_the_data() -> None:
    boxes = np.array([[0, 0, 4, 4], [1, 1, 3, 3], [2, 2, 9, 9]], np.float32)
    flags = np.array([False, True, False]), np.array([False, False, True])
    objects = Objects(boxes, np.arange(3, dtype=np.int32), np.array([5.0, 4.0, 30.0], np.float32), *flags)

    class One:
        def record(self, index: int) -> Record:
            return Record(index, (10, 10), objects)

    (true,) = detector.truths(One(), [0])  # type: ignore[arg-type]
    assert true.ignored.tolist() == [False, True, True] and true.areas.tolist() == [5.0, 4.0, 30.0]
