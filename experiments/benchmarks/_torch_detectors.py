"""What the peer does in a turn of `detectors`: libreyolo's YOLOX on torch. Imports no JAX."""

import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks._sides import Prepared, resident_gb

_SHOWN = 64  # as in _detectors.py
_PACKAGES = ("", ".models", ".models.yolox", ".training")  # whose __init__ files import OpenCV and more


def infer(folder: str, batch: str, *, depth: int, width: int, classes: int) -> Prepared:
    """Prepare the decoded predictions of a batch of images, before non-maximum suppression.

    Args:
        folder: the checkpoint.
        batch: file with the fields of a batch.
        depth: bottlenecks of a short stage.
        width: channels of the stem.
        classes: number of classes.
    """
    import torch

    model, images = _model(folder, depth, width, classes).eval(), _images(batch)
    model.head.export = True

    def run() -> Any:
        with torch.inference_mode():
            return model.head(model.backbone(images))

    flat = run().numpy().reshape(-1)
    run()
    told = [float(value) for value in flat[np.arange(_SHOWN) * len(flat) // _SHOWN]]

    def turn() -> dict[str, Any]:
        run()
        return {}

    return {"predictions": told, "resident_gb": resident_gb()}, turn


def train(folder: str, batch: str, *, learning_rate: float, depth: int, width: int, classes: int) -> Prepared:
    """Prepare a training step: forward and backward pass, assignment, SGD with Nesterov momentum; see `infer`."""
    import torch

    model, images, labels = _model(folder, depth, width, classes).train(), _images(batch), _labels(batch)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in weights if parameter.ndim > 1], "weight_decay": 5e-4},
        {"params": [parameter for parameter in weights if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)

    def step() -> float:
        loss = model.head(model.backbone(images), labels=labels, imgs=images)["total_loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    loss = step()
    for _ in range(2):
        step()
    return {"loss": loss, "resident_gb": resident_gb()}, lambda: {"loss": step()}


def _model(folder: str, depth: int, width: int, classes: int) -> Any:
    """Return libreyolo's model with the folder's weights, and the epsilon and momentum of the authors' experiments."""
    spec = find_spec("libreyolo")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'libreyolo'")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in _PACKAGES:
        package = types.ModuleType(f"libreyolo{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(f"libreyolo{name}", package)
    import torch
    from libreyolo.models.yolox import nn
    from safetensors.torch import load_file

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torch.nn.Module()
    model.backbone = nn.YOLOPAFPN(depth=depth / 3, width=width / 64)
    model.head = nn.YOLOXHead(classes, width=width / 64)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps, part.momentum = 1e-3, 0.03
    model.load_state_dict(load_file(str(Path(folder) / "model.safetensors")))
    return model


def _images(batch: str) -> Any:
    """Return the images as the peer reads them: [B, 3, H, W] in blue, green, red."""
    import torch

    with np.load(batch) as stored:
        return torch.from_numpy(stored["images"][..., ::-1].transpose(0, 3, 1, 2).copy())


def _labels(batch: str) -> Any:
    """Return [B, M, 5]: class, centre and sides of every box, zeros for padding."""
    import torch

    with np.load(batch) as stored:
        low, high = stored["boxes"][..., :2], stored["boxes"][..., 2:]
        rows = np.concatenate([stored["labels"][..., None], (low + high) / 2, high - low], axis=-1)
        return torch.from_numpy((rows * stored["box_mask"][..., None]).astype(np.float32))
