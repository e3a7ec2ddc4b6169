"""How YOLOv3 is compared with what libreyolo computed once on small networks (tests/hub/darknet_files.py).

Beside weights and gradients (of a readout of the raw predictions) the file holds of each case
  CASE/boxes, objectness, classes   float32: the raw predictions;
  CASE/decoded, scores              float32: boxes in pixels, and each class's score.
"""

from types import SimpleNamespace

import jax
import numpy as np

from fm_jax.core import statistics
from tests.goldens.stored import Golden, entry
from tests.parity.changes import change
from tests.parity.detectors import darknets
from tests.parity.vision.yolov3 import FORMS

TOLERANCE = 1e-3  # of the standard deviation of libreyolo's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("yolov3", every=7)
CASES = tuple(darknets.SMALL)
load = GOLDEN.load

_RAW = ("boxes", "objectness", "classes")


def made() -> dict[str, np.ndarray]:
    """Compute what the file is to hold; needs libreyolo."""
    found = dict[str, np.ndarray]()
    for case, name in darknets.SMALL.items():
        peer = darknets.peer(case)
        answer, config = darknets.theirs(case, peer), SimpleNamespace(to_dict=lambda name=name: FORMS[name])
        found |= entry(case, config, darknets.tensors(peer), answer["gradients"], every=GOLDEN.every)
        found |= {f"{case}/{output}": array for output, array in answer["outputs"].items()}
    return found


def distances(case, model, params, places) -> dict[str, float]:
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    mine = jax.device_get(darknets.ours(model, darknets.images(case))(params))
    kept = GOLDEN.under(case)
    found = darknets.distances(mine, {"outputs": {name: kept[name] for name in (*_RAW, "decoded", "scores")}})
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], statistics.split(places)[0])}


def _turned(model):
    return change(model, anchors=tuple(tuple(pair[::-1] for pair in pairs) for pairs in model.cfg.anchors))


WRONG = {
    "yolov3: another epsilon": (
        "small-yolov3", lambda model: change(model, norm_epsilon=1e-2), {"objectness": 3, "gradients": 3}, ()
    ),
    "yolov3-tiny: anchors turned": ("small-yolov3-tiny", _turned, {"decoded": 3}, (*_RAW, "scores", "gradients")),
    "yolov3-spp: pools in another order": (
        "small-yolov3-spp", lambda model: change(model, pools=model.cfg.pools[::-1]), {"objectness": 3}, ()
    ),
}  # fmt: skip


def covered(models):
    """Assert that the cases are residual, pooled, and with a pyramid of pools."""
    assert {(bool(model.cfg.depths), bool(model.cfg.pools)) for model in models} == {
        (True, False), (False, False), (True, True)
    }  # fmt: skip
