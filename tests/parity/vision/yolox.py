"""YOLOX: a tiny config.json of every form, and how our side answers.

Live torch is compared in ../detectors, where its peer can be imported; ../../goldens holds what it answered once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core import statistics, tree
from fm_jax.hub import families, table
from fm_jax.objectives.detection.yolox import yolox
from tests.parity import convert

_yolox = {
    "model_type": "yolox", "architectures": ["YOLOX"], "depth": 1, "width": 4,
    "id2label": {"0": "disc", "1": "bar", "2": "star"}, "label2id": {"disc": 0, "bar": 1, "star": 2},
}  # fmt: skip

FORMS = {
    "yolox": _yolox,
    "yolox-depthwise": {**_yolox, "depthwise": True},
}
LARGER = {"yolox-deep": {**_yolox, "depth": 2}}  # compared with the peer alone

FEW = ("yolox-depthwise",)  # one of each way of naming and storing

CASES: dict[str, Any] = {}
MUTANTS: dict[str, Any] = {}

HEIGHT, WIDTH, ROWS, BOXES, CLASSES = 64, 96, 4, 5, 3
TERMS = {"iou_loss": "iou_loss", "obj_loss": "objectness_loss", "cls_loss": "class_loss", "l1_loss": "l1_loss"}


def batch(seed: int = 1) -> dict[str, np.ndarray]:
    """Return images with slow and fast changes and up to four boxes each; one image has none."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    turns = rng.normal(0, 0.3, (2, ROWS, 1, 1, 3))
    waves = np.sin(rows[None, :, :, None] * turns[0] + columns[None, :, :, None] * turns[1])
    images = (waves + rng.normal(0, 0.7, waves.shape)).astype(np.float32)
    mask = np.arange(BOXES) < np.array([[4], [0], [1], [2]])
    centre = rng.uniform(0.1, 0.9, (ROWS, BOXES, 2)) * [WIDTH, HEIGHT]
    sides = np.exp(rng.uniform(np.log(6), np.log(60), (ROWS, BOXES, 2)))
    boxes = np.concatenate([centre - sides / 2, centre + sides / 2], axis=-1) * mask[..., None]
    labels = rng.integers(0, CLASSES, (ROWS, BOXES)) * mask
    return {
        "images": images,
        "boxes": boxes.astype(np.float32),
        "labels": labels.astype(np.int32),
        "box_mask": mask,
        "weights": np.ones(ROWS, np.float32),
    }


def drawn(module: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the peer's tensors by its names, none 0 or 1: running variances in 0.5 … 2, the others about their start."""
    rng, found = np.random.default_rng(seed), {}
    specs = table.specs(families.writing(module).table(module), families.abstract(module))
    for name, (_, shape) in sorted(specs.items()):
        if name.endswith("running_var"):
            new = rng.uniform(0.5, 2, shape)
        elif len(shape) > 1:
            new = rng.normal(0, (1.5 / np.prod(shape[1:])) ** 0.5, shape)
        else:  # a norm's scale is the only vector called weight
            new = rng.normal(float(name.endswith("weight")), 0.3, shape)
        found[name] = new.astype(np.float32)
    return found


def numbered(module: Any) -> dict[str, np.ndarray]:
    """Return tensors of the peer's names and shapes, every number its place among all, in the order of the names."""
    found, start = {}, 0
    for name, tensor in sorted(drawn(module).items()):
        found[name] = np.arange(start, start + tensor.size, dtype=np.float32).reshape(tensor.shape)
        start += tensor.size
    return found


def load(form: str) -> tuple[Any, Any]:
    """Return our module and its drawn parameters."""
    module = convert.module((FORMS | LARGER)[form])
    return module, convert.params(module, drawn(module))


def ours(model: Any, fields: Mapping[str, np.ndarray], *, train: bool = False) -> Any:
    """Return a jitted params -> our answer: raw predictions, mean loss and its terms, gradients, next statistics."""
    given = {name: jnp.asarray(field) for name, field in fields.items()}
    loss_fn, rng = yolox(model.apply, l1_from=0), jax.random.key(0) if train else None

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        trained, running = statistics.split(params)

        def mean(trained: Any) -> tuple[jax.Array, Any]:
            found = loss_fn(tree.merge(trained, running), given, rng, None)
            return found.sum / found.weight, (found.metrics, found.updates)

        (loss, (metrics, updates)), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        options = {"mutable": ["statistics"]} if train else {}
        out = model.apply({"params": params}, given["images"], **options)
        raw = out[0] if train else out
        return {
            "outputs": {"raw": jnp.concatenate([raw.boxes, raw.objectness[..., None], raw.classes], axis=-1)},
            "loss": loss,
            "terms": {name: total / weight for name, (total, weight) in metrics.items()},
            "gradients": gradients,
            "statistics": {name: value for name, (value, _) in updates.items()},
        }

    return compute
