"""What a Faster R-CNN starts from (`--init.from`): a backbone that was trained before, or a whole detector.

given = detector_start.load(cfg.init.from_, **cfg.init.options, shapes=resumes(workdir))
model = FasterRCNN(cfg.detector, ResNet(detector_start.form(given, cfg.backbone)))
params = detector_start.onto(fresh, model, given, classes)  # where `fresh` is made, also under jit
"""

import logging
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import flax.linen as nn

from fm_jax.checkpoint import surgery
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params, backbone
from fm_jax.hub import families
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import resnet
from fm_jax.models.vision.faster_rcnn import FasterRCNN
from fm_jax.tasks import vision
from fm_jax.tasks.init import open_run

_log = logging.getLogger(__name__)

_PARTS = ("pyramid/.*", "rpn/.*", "box/.*")  # all but the backbone
_CLASSES = ("box/logits/.*", "box/deltas/.*")  # whose rows are classes


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    step: str = "best",
    ignore: Iterable[str] = (),
    shapes: bool = False,
) -> Pretrained:
    """Read a detector or a backbone of a run (a classifier's, SimCLR's) or of a public checkpoint.

    Args:
        source: a run's work directory, a checkpoint folder, or OWNER/NAME.
        revision: commit, branch or tag of OWNER/NAME.
        step: checkpoint of a run: "best" (the last, if none was evaluated), "last" or a step number.
        ignore: unknown fields of a folder's config.json that do not change the computation.
        shapes: give the parameters' shapes and read no weights: enough for a run that is resumed.

    Returns:
        A `FasterRCNN` with the names of its classes, or a `ResNet`, and its parameters.

    Raises:
        CheckpointError: the source is missing or damaged, or its model does not read images.
        ConfigError: its model is neither.
    """
    ignore = tuple(ignore)
    run = open_run(source, revision, step, ignore=ignore)
    if run is not None and isinstance(module := run.model(), FasterRCNN):
        given = Pretrained(module, families.abstract(module) if shapes else run.params(), None, run.classes)
    elif run is not None:
        given = vision.load(source, step=step, shapes=shapes)
    else:
        given = public.load(source, revision=revision, ignore=ignore, shapes=shapes)
        if not isinstance(given.module, FasterRCNN):
            module, params = given.backbone()
            given = Pretrained(module, params, None, preprocessing=given.preprocessing)
    if not isinstance(bare := backbone(given.module), resnet.ResNet):
        raise ConfigError(f"{source} has a model of class {type(bare).__name__}; a Faster R-CNN starts from a ResNet")
    return given


def form(given: Pretrained, base: resnet.Config) -> resnet.Config:
    """Return the config of the given backbone, with those settings of `base` that only training and precision read.

    Among them is `norm_frozen`, so a backbone whose batch norms were trained can be frozen in a detector.
    """
    own: resnet.Config = backbone(given.module).cfg
    return replace(own, **dict(_settings(base, form=False)))


def onto(fresh: Params, model: nn.Module, given: Pretrained, classes: Iterable[str] = ()) -> Params:
    """Return a detector's parameters with the given ones in their place.

    A backbone replaces the backbone. A detector replaces all; the two layers that have a row for each class stay
    random, unless it was trained on the same classes in the same order.

    Args:
        fresh: initialised parameters of `model`, a `FasterRCNN` on a `ResNet`.
        model: what is trained.
        given: of `load`.
        classes: names of the classes that `model` is to find.

    Raises:
        ConfigError: the two backbones do not compute the same; the message names the fields that differ.
        CheckpointError: weights do not fit, such as those of another pyramid; the message names them.
    """
    own, old = (dict(_settings(backbone(module).cfg, form=True)) for module in (model, given.module))
    if differ := [f"{name} {old[name]} (here {own[name]})" for name in own if own[name] != old[name]]:
        raise ConfigError(f"the given backbone is of another form than the detector's: {', '.join(differ)}")
    if not isinstance(given.module, FasterRCNN):
        return surgery.load(fresh, {"backbone": given.params}, fresh=_PARTS)
    if given.labels and given.labels == tuple(classes):
        return surgery.load(fresh, given.params)
    _log.info("the detector was trained on other classes, so the layers for classes and their boxes start randomly")
    return surgery.load(fresh, given.params, fresh=_CLASSES, unused=_CLASSES)


def _settings(cfg: resnet.Config, *, form: bool) -> list[tuple[str, Any]]:
    """Return the fields that change the computation, or those that only training and precision read."""
    return [
        (field.name, getattr(cfg, field.name))
        for field in fields(cfg)
        if bool(field.metadata.keys() & {"training", "precision"}) != form
    ]
