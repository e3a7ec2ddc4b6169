"""Faster R-CNN: a tiny config.json of every form. Live torchvision is in a folder of its own, `parity/detectors`."""

from typing import Any

_small = {
    "model_type": "faster_rcnn", "architectures": ["FasterRCNN"], "num_classes": 4, "depths": [1, 1, 1],
    "hidden_sizes": [8, 16, 16], "layer_type": "basic", "embedding_size": 8, "out_channels": 16,
    "anchor_sizes": [8.0, 16.0, 24.0, 40.0], "rpn_pre_nms_top_n_train": 96, "rpn_pre_nms_top_n_test": 64,
    "rpn_post_nms_top_n_train": 48, "rpn_post_nms_top_n_test": 32, "output_size": 3, "canonical_scale": 48.0,
    "representation_size": 24, "box_detections_per_img": 16,
}  # fmt: skip

FORMS = {
    "faster-rcnn": {**_small, "id2label": {"0": "ball", "1": "box", "2": "cone"}, "norm_eps": 0.0},
    "faster-rcnn-bottleneck": {
        **_small, "depths": [2, 1], "hidden_sizes": [16, 32], "layer_type": "bottleneck", "num_channels": 1,
        "anchor_sizes": [8.0, 16.0, 32.0], "aspect_ratios": [0.5, 2.0], "norm_frozen": False, "rpn_nms_thresh": 0.6,
        "box_score_thresh": 0.1, "box_nms_thresh": 0.4, "sampling_ratio": 1,
    },
}  # fmt: skip

FEW = ("faster-rcnn",)  # one of each way of naming and storing

CASES: dict[str, Any] = {}
MUTANTS: dict[str, Any] = {}
