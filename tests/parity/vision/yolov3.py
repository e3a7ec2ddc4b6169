"""YOLOv3: a small network of every form, as the hub reads it of a Darknet .cfg.

transformers has none; tests/parity/detectors compares it with libreyolo, in a process of its own.
"""

from typing import Any

from tests.hub.darknet_files import NETWORKS, sections

FORMS = {
    name: {"model_type": "yolov3", "architectures": ["YOLOv3"], "sections": sections(words)}
    for name, words in NETWORKS.items()
}
FEW = ()  # Darknet's files are no folders of safetensors

CASES: dict[str, Any] = {}
MUTANTS: dict[str, Any] = {}
