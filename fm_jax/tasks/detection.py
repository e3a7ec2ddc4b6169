"""Open a detector, of a run of this project or public, and find objects with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.core.types import Batch, Params, backbone
from fm_jax.data.boxes import pipeline
from fm_jax.data.images.pictures import IMAGENET_MEAN, IMAGENET_STD
from fm_jax.evals.scores.detector import Detect
from fm_jax.hub import families
from fm_jax.hub import pretrained as public
from fm_jax.models.vision import faster_rcnn, yolov3, yolox
from fm_jax.models.vision.faster_rcnn import FasterRCNN
from fm_jax.models.vision.yolov3 import YOLOv3
from fm_jax.models.vision.yolox import YOLOX
from fm_jax.tasks.init import Init, open_run, resumes

Detector = YOLOX | YOLOv3 | FasterRCNN

CLASS_LEAVES: dict[type[nn.Module], tuple[str, ...]] = {
    YOLOX: (r"head\d+/class/.*",),
    YOLOv3: (r"predict\d+/.*",),
    FasterRCNN: ("box/logits/.*", "box/deltas/.*"),
}
"""Patterns of the parameters whose shapes depend on the number of classes."""


@dataclass(frozen=True)
class Opened:
    """A model to start from or to find objects with."""

    module: nn.Module
    params: Params  # or their shapes
    classes: tuple[str, ...]  # () if the source names none
    data: pipeline.Config | None  # the preprocessing of a run's data; None for a public folder


def load(source: Path, init: Init | None = None, *, shapes: bool = False) -> Opened:
    """Open the model of a run, or of a public folder.

    Args:
        source: a run's work directory, a checkpoint folder, a Darknet model, or OWNER/NAME.
        init: revision, step and fields to ignore.
        shapes: give the parameters' shapes and read no weights: enough for a run that is resumed.

    Raises:
        CheckpointError: the source is missing or damaged.
    """
    init = init or Init()
    run = open_run(source, init.revision, init.step, ignore=init.ignore)
    if run is None:
        given = public.load(source, revision=init.revision, ignore=init.ignore, shapes=shapes)
        return Opened(given.module, given.params, given.labels, None)
    module = run.model()
    params = families.abstract(module) if shapes else run.params()
    data = from_dict(pipeline.Config, run.config["data"]) if isinstance(module, Detector) else None
    return Opened(module, params, run.classes, data)


def start_of(cfg: Init, workdir: Path) -> Opened | None:
    """Return the model that a training starts from: None for a random start, and for a run that goes on by itself."""
    return None if cfg.from_ is None or resumes(workdir) else load(cfg.from_, cfg)


def detector(opened: Opened, source: Path) -> Detector:
    """Return the module if it is a detector.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(opened.module, Detector):
        kind = type(opened.module).__name__
        raise CheckpointError(f"{source} has a model of class {kind}, which finds no objects; give a detector's run")
    return opened.module


def start(fresh: Params, module: Detector, opened: Opened, source: Path) -> tuple[Params, dict[str, Any]]:
    """Return what `surgery.load` needs to begin with an opened model: its parameters, and patterns that stay random.

    A detector of the same kind gives all its parameters, but for those of the classes if their number differs. A
    network with a backbone, or a bare one, gives the backbone of a Faster R-CNN.

    Raises:
        ConfigError: the model cannot start this one.
    """
    old = opened.module
    if type(old) is type(module):
        same = count_classes(old) == count_classes(module)  # type: ignore[arg-type]
        return opened.params, {} if same else _without_classes(opened.params, CLASS_LEAVES[type(old)])
    bare, params = backbone(old), opened.params
    if isinstance(module, FasterRCNN) and isinstance(bare, type(module.backbone)):
        own = params["backbone"] if bare is not old else {name: part for name, part in params.items() if name != "head"}
        return {"backbone": own}, {"fresh": tuple(f"{part}/.*" for part in fresh if part != "backbone")}
    wanted = type(module).__name__ + (
        f" or a {type(module.backbone).__name__}" if isinstance(module, FasterRCNN) else ""
    )
    raise ConfigError(f"{source} has a {type(old).__name__}; init.from must be a {wanted}")


def _without_classes(params: Params, patterns: tuple[str, ...]) -> dict[str, Any]:
    return {"fresh": patterns, "unused": patterns}


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
