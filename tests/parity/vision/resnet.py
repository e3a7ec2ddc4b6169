"""ResNet: a tiny config.json of every form, and what live torch is compared on."""

from typing import Any

import numpy as np

from tests.parity import conv_nets
from tests.parity.changes import change, edit
from tests.parity.conv_nets import turned
from tests.parity.labels import LABELS

_resnet = {
    "model_type": "resnet", "depths": [2, 1], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "bottleneck",
    "architectures": ["ResNetForImageClassification"],
}  # fmt: skip

FORMS = {
    "resnet": {**_resnet, **LABELS},
    "resnet-v1": {**_resnet, "downsample_in_bottleneck": True, "downsample_in_first_stage": True, "num_channels": 1,
                  "architectures": ["ResNetModel"]},
    "resnet-basic": {**_resnet, "layer_type": "basic"},
}  # fmt: skip

FEW = ("resnet",)  # one of each way of naming and storing

_peer = {"embedding_size": 8, "depths": [2, 1], "hidden_sizes": [8, 16], "layer_type": "basic"}
_narrow = {**_peer, "hidden_sizes": [16, 32], "layer_type": "bottleneck"}

# name -> (family, options, (height, width))
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "resnet-basic": ("ResNet", _peer, (34, 48)),
    "resnet-basic-odd": ("ResNet", {**_peer, "depths": [1, 2], "num_channels": 1}, (45, 35)),
    "resnet-bottleneck": ("ResNet", _narrow, (48, 34)),
    "resnet-v1": ("ResNet", {**_narrow, "downsample_in_bottleneck": True}, (34, 48)),
    "resnet-halved-early": ("ResNet", {**_narrow, "downsample_in_first_stage": True}, (48, 66)),
    "resnet-v1-halved-early": (
        "ResNet",
        {**_narrow, "downsample_in_first_stage": True, "downsample_in_bottleneck": True},
        (67, 48),
    ),
    "resnet-four-stages": (
        "ResNet", {**_peer, "depths": [1, 2, 2, 1], "hidden_sizes": [16, 16, 24, 32], "layer_type": "bottleneck"},
        (96, 75),
    ),
}  # fmt: skip


def peer(case: str, *, moved: bool = True) -> Any:
    """Return the peer, with every tensor moved."""
    stem, options, _ = CASES[case]
    return conv_nets.build(stem, options, moved=moved)


def batch(case: str) -> dict[str, np.ndarray]:
    """Return the images of a case and their labels."""
    _, options, size = CASES[case]
    return conv_nets.images(size, options.get("num_channels", 3))


def theirs(case: str, model: Any, *, train: bool = False) -> dict[str, Any]:
    """Return the peer's answer."""
    return conv_nets.theirs(batch(case), model, train=train)


TOLERANCE = 5e-5  # of the peer's standard deviation, in float32 on CPU: ten times what was measured
INSIDES, tensors, ours = conv_nets.INSIDES, conv_nets.tensors, conv_nets.ours

MUTANTS = {
    "v1 instead of v1.5": ("resnet-bottleneck", lambda m, p: (change(m, stride_first=True), p)),
    "v1.5 instead of v1": ("resnet-v1", lambda m, p: (change(m, stride_first=False), p)),
    "a first stage that keeps the size": ("resnet-halved-early", lambda m, p: (change(m, first_stride=1), p)),
    "another epsilon": ("resnet-basic", lambda m, p: (change(m, norm_epsilon=1e-3), p)),
    "no shortcuts": ("resnet-basic", lambda m, p: (change(m, shortcut="none"), p)),
    "shortcuts without parameters": ("resnet-basic", lambda m, p: (change(m, shortcut="pad"), p)),
    "height and width of kernels": ("resnet-basic-odd", lambda m, p: (m, edit(p, "kernel", turned))),
    "running means lost": ("resnet-v1", lambda m, p: (m, edit(p, "/mean", np.zeros_like))),
}
