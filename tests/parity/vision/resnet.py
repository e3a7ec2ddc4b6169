"""ResNet: a tiny config.json of every form."""

from tests.parity.labels import LABELS

_resnet = {
    "model_type": "resnet", "depths": [2, 1], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "bottleneck",
    "architectures": ["ResNetForImageClassification"],
}  # fmt: skip

FORMS = {
    "resnet": {**_resnet, **LABELS},
    "resnet-v1": {**_resnet, "downsample_in_bottleneck": True, "num_channels": 1, "architectures": ["ResNetModel"]},
    "resnet-basic": {**_resnet, "layer_type": "basic"},
}  # fmt: skip

FEW = ("resnet",)  # one of each way of naming and storing
