"""EfficientNet: a tiny config.json of every form, and what live torch is compared on."""

from typing import Any

import numpy as np

from tests.parity import conv_nets
from tests.parity.changes import change, edit
from tests.parity.conv_nets import turned
from tests.parity.labels import LABELS

_efficientnet = {
    "model_type": "efficientnet", "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320,
    "image_size": 42, "depthwise_padding": [1, 2, 6], "num_block_repeats": [1, 1, 1, 3, 1, 1, 1], "dropout_rate": 0.2,
    "architectures": ["EfficientNetForImageClassification"],
}  # fmt: skip

FORMS = {
    "efficientnet": {**_efficientnet, **LABELS},
    "efficientnet-base": {**_efficientnet, "architectures": ["EfficientNetModel"], "dropout_rate": 0.0},
}  # fmt: skip

FEW = ("efficientnet",)  # one of each way of naming and storing

_whole = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
_part = {
    "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "kernel_sizes": [3, 5, 3],
    "in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "strides": [1, 2, 2], "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 4, 6],
}  # fmt: skip

# name -> (family, options, (height, width)). Theirs pads both axes alike, so height and width of an EfficientNet's
# images halve through even and odd sizes at the same blocks: those that `depthwise_padding` lists are odd.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "efficientnet-even": ("EfficientNet", {**_part, "image_size": 32}, (32, 48)),
    "efficientnet-odd": ("EfficientNet", {**_part, "image_size": 42, "depthwise_padding": [1, 3]}, (42, 26)),
    "efficientnet-seven-stages": (
        "EfficientNet", {**_whole, "image_size": 42, "depthwise_padding": [1, 2, 7]}, (42, 74)
    ),
    "efficientnet-deep-wide": (
        "EfficientNet",
        {**_part, "width_coefficient": 0.7, "depth_coefficient": 1.4, "hidden_dim": 896, "image_size": 38,
         "depthwise_padding": [2], "num_channels": 1, "batch_norm_eps": 1e-2, "squeeze_expansion_ratio": 0.4},
        (22, 38),
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
FRESH = False  # in evaluation a fresh one's outputs are all alike: they have no deviation to measure in
INSIDES, tensors, ours = conv_nets.INSIDES, conv_nets.tensors, conv_nets.ours

MUTANTS = {
    "another epsilon": ("efficientnet-even", lambda m, p: (change(m, norm_epsilon=1e-5), p)),
    "height and width of kernels": ("efficientnet-odd", lambda m, p: (m, edit(p, "kernel", turned))),
    "a squeeze's bias lost": ("efficientnet-odd", lambda m, p: (m, edit(p, "squeeze/expand/bias", np.zeros_like))),
}
