"""EfficientNet: a tiny config.json of every form."""

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
