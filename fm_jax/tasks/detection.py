"""Open a detector, of a run of this project or public, and find objects with it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from fm_jax.checkpoint import surgery
from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.core.types import Batch, Params
from fm_jax.data.boxes import pipeline
from fm_jax.data.images.pictures import IMAGENET_MEAN, IMAGENET_STD
from fm_jax.evals.scores.detector import Detect
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import faster_rcnn, yolov3, yolox
from fm_jax.models.vision.faster_rcnn import FasterRCNN
from fm_jax.models.vision.yolov3 import YOLOv3
from fm_jax.models.vision.yolox import YOLOX
from fm_jax.tasks import detector_start
from fm_jax.tasks.init import Init, open_run, resumes

Detector = YOLOX | YOLOv3 | FasterRCNN

_log = logging.getLogger(__name__)
_CLASSES: dict[type[nn.Module], tuple[str, ...]] = {YOLOX: (r"head\d+/class/.*",), YOLOv3: (r"predict\d+/.*",)}
"""Patterns of the parameters whose rows are classes."""


@dataclass(frozen=True)
class Opened:
    """A model to start from or to find objects with."""

    module: nn.Module
    params: Params
    classes: tuple[str, ...]  # () if the source names none
    data: pipeline.Config | None  # the preprocessing of a run's data; None for a public folder


def load(source: Path, init: Init | None = None) -> Opened:
    """Open the model of a run, or of a public folder.

    Args:
        source: a run's work directory, a checkpoint folder, a Darknet model, or OWNER/NAME.
        init: revision, step and fields to ignore.

    Raises:
        CheckpointError: the source is missing or damaged.
    """
    init = init or Init()
    run = open_run(source, init.revision, init.step, ignore=init.ignore)
    if run is None:
        given = public.load(source, revision=init.revision, ignore=init.ignore)
        return Opened(given.module, given.params, given.labels, None)
    module = run.model()
    data = from_dict(pipeline.Config, run.config["data"]) if isinstance(module, Detector) else None
    return Opened(module, run.params(), run.classes, data)


def start_of(cfg: Init, module: Detector, workdir: Path) -> Pretrained | None:
    """Return the model that a training starts from: None for a random start, and for a run that is resumed.

    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: it cannot start such a detector.
    """
    if cfg.from_ is None or resumes(workdir):
        return None
    if isinstance(module, FasterRCNN):
        return detector_start.load(cfg.from_, **cfg.options)
    opened = load(cfg.from_, cfg)
    if type(opened.module) is not type(module):
        kinds = type(opened.module).__name__, type(module).__name__
        raise ConfigError(f"{cfg.from_} has a {kinds[0]}, from which a {kinds[1]} cannot start; give one of that kind")
    return Pretrained(opened.module, opened.params, None, opened.classes)


def detector(opened: Opened, source: Path) -> Detector:
    """Return the module if it is a detector.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(opened.module, Detector):
        kind = type(opened.module).__name__
        raise CheckpointError(f"{source} has a model of class {kind}, which finds no objects; give a detector's run")
    return opened.module


def onto(fresh: Params, module: Detector, given: Pretrained, classes: tuple[str, ...]) -> Params:
    """Return a detector's initialised parameters with the given ones in their place.

    Those whose rows are classes stay random, unless the given ones are for the same classes in the same order.

    Raises:
        CheckpointError: weights do not fit; the message names them.
    """
    if isinstance(module, FasterRCNN):
        return detector_start.onto(fresh, module, given, classes)
    if given.labels == classes:
        return surgery.load(fresh, given.params)
    _log.info("the detector was trained on other classes, so the layers for classes start randomly")
    own = _CLASSES[type(module)]
    return surgery.load(fresh, given.params, fresh=own, unused=own)


def finder(module: Detector) -> Detect:
    """Return the compiled function (params, batch) -> detections in pixels of the batch's "images" [B, H, W, 3]."""

    def find(params: Params, batch: Batch) -> Any:
        images = batch["images"]
        size, outputs = (images.shape[1], images.shape[2]), module.apply({"params": params}, images)
        if isinstance(module, YOLOX):
            return yolox.detect(outputs, size)
        if isinstance(module, YOLOv3):
            return yolov3.detect(module.cfg, outputs, size)
        return faster_rcnn.detect(module.cfg, outputs, size)

    return jax.jit(find)


def count_classes(module: Detector) -> int:
    """Return the number of classes, without a background."""
    return module.cfg.num_classes


def named(opened: Opened, names: tuple[str, ...], source: Path) -> tuple[str, ...]:
    """Return the names of a detector's classes: those given, else the source's, else numbers.

    Raises:
        ConfigError: another number of names is given.
    """
    count = count_classes(detector(opened, source))
    if names and len(names) != count:
        raise ConfigError(f"classes names {len(names)} ({shown(names)}), but the detector has {count}; name each")
    return names or opened.classes or tuple(f"class {number}" for number in range(count))


def preprocessing(opened: Opened, source: Path) -> pipeline.Config:
    """Return how images are to be fitted into the detector's input.

    That is a run's own way, and for a public folder that of the authors: YOLOX 640 × 640 (nano and tiny 416), YOLOv3
    its .cfg's size, Faster R-CNN shorter side 800 on a canvas that holds both orientations. Two differ in the last
    digits from their programs: Darknet puts the image in the middle of its canvas, torchvision pads with zeros.
    """
    module = detector(opened, source)
    if opened.data is not None:
        return opened.data
    if isinstance(module, YOLOX):
        side = 640 if module.cfg.width >= yolox.yolox_s().width else 416
        return pipeline.Config(size=(side, side), mean=yolox.MEAN, std=yolox.STD)
    if isinstance(module, YOLOv3):
        return pipeline.Config(size=module.cfg.image_size, fill=128)
    return pipeline.Config(size=(1344, 1344), fit="short", mean=IMAGENET_MEAN, std=IMAGENET_STD, fill=116)
