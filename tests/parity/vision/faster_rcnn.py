"""Faster R-CNN: a tiny config.json of every form, and what torchvision is compared on.

Live torchvision is in a folder of its own (`parity/detectors`), so no CASE is listed here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core import statistics, tree
from fm_jax.models.vision import faster_rcnn as model
from fm_jax.objectives.detection import faster_rcnn as objective

_small = {
    "model_type": "faster_rcnn", "architectures": ["FasterRCNN"], "num_classes": 4, "depths": [1, 1, 1],
    "hidden_sizes": [8, 16, 16], "layer_type": "basic", "embedding_size": 8, "out_channels": 16,
    "anchor_sizes": [12.0, 12.0, 24.0, 40.0], "rpn_pre_nms_top_n_train": 192, "rpn_pre_nms_top_n_test": 64,
    "rpn_post_nms_top_n_train": 224, "rpn_post_nms_top_n_test": 96, "output_size": 3, "canonical_scale": 32.0,
    "representation_size": 24, "box_detections_per_img": 40,
}  # fmt: skip

FORMS = {
    "faster-rcnn": {**_small, "id2label": {"0": "ball", "1": "box", "2": "cone"}, "norm_eps": 1e-3},
    "faster-rcnn-bottleneck": {
        **_small, "depths": [2, 1], "hidden_sizes": [16, 32], "layer_type": "bottleneck", "num_channels": 1,
        "anchor_sizes": [12.0, 20.0, 32.0], "aspect_ratios": [0.5, 2.0], "norm_frozen": False, "rpn_nms_thresh": 0.6,
        "box_score_thresh": 0.1, "box_nms_thresh": 0.4, "sampling_ratio": 1,
    },
}  # fmt: skip

FEW = ("faster-rcnn",)  # one of each way of naming and storing

CASES: dict[str, Any] = {}
MUTANTS: dict[str, Any] = {}

# Else few proposals are left after suppression, all detections are sure, and the probabilities by which torchvision
# orders proposals are equal where the logits, ours, are not.
_SMALLER = {"rpn.head.bbox_pred": 0.1, "roi_heads.box_predictor.cls_score": 0.3, "rpn.head.cls_logits": 0.3}

LOSS = objective.Config(anchors=64, proposals=16)  # quotas that every image of `batch` fills
SIZE = (64, 96)  # multiples of the coarsest stride: torchvision pads others


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Return tensors of a peer's names and shapes, none of them 0 or 1; running variances are in 0.5 … 2."""
    rng, drawn = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("running_var"):
            new = rng.uniform(0.5, 2, shape)
        elif len(shape) > 1:
            new = rng.normal(0, (1.5 / np.prod(shape[1:])) ** 0.5, shape)
        else:  # a norm's scale is the only vector called weight
            new = rng.normal(float(name.endswith("weight")), 0.3, shape)
        for part, factor in _SMALLER.items():
            new = factor * new if name.startswith(part) else new
        drawn[name] = new.astype(np.float32)
    return drawn


def batch(channels: int = 3, classes: int = 3, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """Return three images with seven objects, none, and three, and padding."""
    rng, (height, width) = np.random.default_rng(1), size
    image = rng.normal(0, 0.7, (3, height, width, channels))
    waves = np.sin(np.arange(height)[:, None, None] * rng.normal(0, 0.3, (3, 1, 1, channels)))
    corner = rng.uniform(0, 0.45, (3, 8, 2))
    boxes = height * np.concatenate([corner, corner + rng.uniform(0.15, 0.45, (3, 8, 2))], axis=2)
    mask = np.arange(8) < np.array([[7], [0], [3]])
    return {
        "images": (image + waves).astype(np.float32),
        "boxes": np.where(mask[..., None], boxes, 0).astype(np.float32),
        "labels": np.where(mask, rng.integers(0, classes, (3, 8)), 0).astype(np.int32),
        "box_mask": mask,
        "weights": np.ones(3, np.float32),
    }


class Drawn(NamedTuple):
    """The samples of a stage: numbers of candidates [B, S], and which are positive; all are valid."""

    index: np.ndarray
    positive: np.ndarray


def ours(module: Any, rows: Mapping[str, np.ndarray], samples: tuple[Drawn, Drawn] | None, cfg: Any = LOSS) -> Any:
    """Return a jitted params -> our answer, with the samples of both stages given; without samples no losses."""

    def taken(drawn: Drawn) -> objective.Sampler:
        all_valid = jnp.ones(drawn.index.shape, bool)
        given = objective.Samples(jnp.asarray(drawn.index, jnp.int32), jnp.asarray(drawn.positive), all_valid)
        return lambda kinds, *_: jax.tree.map(lambda part: part[: len(kinds)], given)

    samplers = (taken(samples[0]), taken(samples[1])) if samples else None
    loss_fn = objective.faster_rcnn(module.apply, cfg, samplers=samplers)

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        trained, running = statistics.split(params)

        def mean(trained: Any) -> tuple[jax.Array, Any]:
            found = loss_fn(tree.merge(trained, running), rows, None, None)
            return found.sum / found.weight, found.metrics

        outputs = module.apply({"params": params}, rows["images"])
        found = {
            "outputs": outputs,
            "detections": model.detect(module.cfg, outputs, rows["images"].shape[1:3]),
        }
        if samples is None:
            return found
        (loss, metrics), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        return found | {
            "losses": {name: metrics[name][0] / metrics[name][1] for name in LOSSES},
            "loss": loss,
            "gradients": gradients,
        }

    return compute


LOSSES = {  # ours -> torchvision's
    "objectness": "loss_objectness",
    "anchor_boxes": "loss_rpn_box_reg",
    "classes": "loss_classifier",
    "boxes": "loss_box_reg",
}
