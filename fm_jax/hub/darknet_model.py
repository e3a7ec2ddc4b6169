"""Open a Darknet model, NAME.cfg and NAME.weights, as a model folder is opened, and write one.

A file NAME.names, or the only .names file beside them (such as coco.names), gives the classes, one a line.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import darknet, stored
from fm_jax.hub.files.darknet import Header
from fm_jax.hub.files.weights import Weights
from fm_jax.hub.vision import yolov3


@dataclass(frozen=True)
class Opened:
    """What a model folder holds."""

    config: Fields
    weights: Weights
    header: Header


def find(source: Path) -> Opened | None:
    """Open the Darknet model that a path is a file of, or that a folder holds; None for others. No tensor is read.

    An option that is neither read nor known to be training's becomes a field KIND.OPTION, which `Fields.close` refuses.

    Raises:
        CheckpointError: a file is missing or malformed, they do not belong together, or a section is not supported.
    """
    if (model := stored.darknet_files(source)) is None:
        return None
    where = str(model.cfg)
    sections = darknet.sections(darknet.read_text(model.cfg), where)
    data: dict[str, Any] = {"model_type": "yolov3", "architectures": ["YOLOv3"], "sections": []}
    for kind, options in sections:
        known = darknet.known(kind)
        data["sections"].append([kind, {name: value for name, value in options.items() if name in known}])
        data |= {f"{kind}.{name}": value for name, value in options.items() if name not in known}
    header, weights = stored.open_darknet(model)
    if model.names is not None:
        data["id2label"] = {str(number): name for number, name in enumerate(_labels(model.names, sections))}
    return Opened(Fields(data, where), weights, header)


def writes(module: nn.Module) -> bool:
    """Say whether a module's public files are Darknet's."""
    return yolov3.writes(module)


def write(
    folder: Path,
    module: nn.Module,
    tensors: Iterable[tuple[str, np.ndarray]],
    labels: Sequence[str] = (),
    header: Header | None = None,
) -> None:
    """Write a model's .cfg and .weights, and its .names if there are labels, into an existing folder.

    Args:
        folder: where to write yolov3.cfg, yolov3.weights and yolov3.names.
        module: the model.
        tensors: what `table.write` gives for it.
        labels: names of the classes.
        header: of the .weights; None: version 0.2, no images seen.

    Raises:
        CheckpointError: a label is empty, has more than one line or space at its ends, and could not be read again.
    """
    if bad := [label for label in labels if not label or label.strip() != label or len(label.splitlines()) != 1]:
        raise CheckpointError(f"label {bad[0]!r} cannot be a line of {darknet.NAMES}; give labels of one line each")
    listed = [section for section, _ in yolov3.sections(module.cfg)]
    stem = folder / "yolov3"
    stem.with_suffix(darknet.CFG).write_text(darknet.cfg_text(listed), "utf-8")
    net, layers = darknet.layers(listed, "the cfg to be written")
    convolutions = darknet.convolutions(net, layers, "the cfg to be written")
    darknet.write_weights(stem.with_suffix(darknet.WEIGHTS), convolutions, tensors, header or Header())
    if labels:
        stem.with_suffix(darknet.NAMES).write_text("\n".join(labels) + "\n", "utf-8")


def _labels(file: Path, sections: Sequence[darknet.Section]) -> list[str]:
    """Return the classes that a .names lists, one for each class of the model."""
    names = [line.strip() for line in darknet.read_text(file).split("\n")]
    while names and not names[-1]:
        names.pop()
    wanted = next((options.get("classes", "20") for kind, options in sections if kind == "yolo"), "")
    if str(len(names)) != wanted or not all(names):
        raise CheckpointError(
            f"{file} names {len(names)} classes, the cfg has {wanted[:20]}; correct it, or remove it to load the model "
            "without names"
        )
    return names
