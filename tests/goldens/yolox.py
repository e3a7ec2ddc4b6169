"""How YOLOX is compared with what libreyolo computed once.

Weights are drawn by a seed (tests/parity/vision/yolox.py), so the file holds none; its gradients are as elsewhere. Of
each case it holds also
  CASE/peer          with the losses and their terms, in evaluation and in training, in float64;
  CASE/raw           float32: predictions in evaluation;
  CASE/train/...     predictions and gradients in training, and "after": the running moments after the step, computed in
                     float64: the norms of 24 numbers a channel magnify the rounding of float32.
"""

import json

import numpy as np

from fm_jax.core import statistics, tree
from tests.goldens.stored import Golden, flat
from tests.parity import convert
from tests.parity.changes import change
from tests.parity.distances import apart
from tests.parity.distances import distances as distances_of
from tests.parity.vision import yolox


class Drawn(Golden):
    """A file whose cases have their weights from a seed."""

    def load(self, case):
        """Return our module, our parameters, and for each of their numbers its place in the peer's flat vector."""
        module = convert.module(self.peers[case]["config"])
        given = (yolox.drawn(module), yolox.numbered(module))
        return module, *(convert.params(module, tensors) for tensors in given)


TOLERANCE = 5e-5  # of the standard deviation of the peer's outputs, or of its gradient's norm; float32 on CPU
TRAINED_TOLERANCE = 5e-3  # see above
GOLDEN = Drawn("yolox", every=27)
CASES = TRAINED = tuple(yolox.FORMS)
load = GOLDEN.load


def answers():
    """Return what the file is to hold, computed by libreyolo."""
    from tests.parity.detectors import yolox_peer

    found = dict[str, np.ndarray]()
    for case in CASES:
        module, batch = convert.module(yolox.FORMS[case]), yolox.batch()
        weights = yolox.drawn(module)
        names, peer = sorted(weights), yolox_peer.peer(case, weights)
        told = {"config": yolox.FORMS[case], "losses": [], "terms": []}
        for train in (False, True):
            answer = yolox_peer.theirs(peer, batch, train=train, double=True)
            told["losses"].append(answer["loss"])
            told["terms"].append(answer["terms"])
            where = f"{case}/train" if train else case
            found[f"{where}/raw"] = answer["outputs"]["raw"].astype(np.float32)
            found[f"{where}/gradients"] = flat(answer["gradients"], names)[:: GOLDEN.every].astype(np.float32)
        moments = [name for name in names if "running_" in name]
        found[f"{case}/train/after"] = flat(answer["after"], moments).astype(np.float32)
        found[f"{case}/peer"] = np.array(json.dumps(told))
    return found


def moved(case, model):
    """Return the peer's running moments after a step, under our names."""
    after, start = GOLDEN.arrays[f"{case}/train/after"], 0
    tensors = yolox.drawn(model)
    for name in sorted(tensors):
        if "running_" in name:
            size, shape = tensors[name].size, tensors[name].shape
            tensors[name] = after[start : start + size].reshape(shape)
            start += size
    assert start == after.size
    return tree.flatten(statistics.split(convert.params(model, tensors))[1])


def distances(case, model, params, places, *, train=False):
    """Return the largest differences of predictions, losses, gradients and running moments, in units of the peer's."""
    about, where = GOLDEN.peers[case], f"{case}/train" if train else case
    mine = yolox.ours(model, yolox.batch(), train=train)(params)
    peer = {"outputs": {"raw": GOLDEN.arrays[f"{where}/raw"]}, "loss": about["losses"][train]}
    if train:
        peer["statistics"] = moved(case, model)
    terms = {name: apart(mine["terms"][name], value) for name, value in about["terms"][train].items()}
    gradients = GOLDEN.steepest(where, mine["gradients"], places)
    return distances_of(mine, peer) | terms | {"gradients": gradients}


WRONG = {
    "yolox: another epsilon": (
        "yolox", lambda model: change(model, norm_epsilon=0.1), {"raw": 3, "gradients": 3}, ()
    ),
    "yolox, depthwise: another epsilon": (
        "yolox-depthwise", lambda model: change(model, norm_epsilon=0.1), {"raw": 3, "gradients": 3}, ()
    ),
}  # fmt: skip


def covered(models):
    """Assert that convolutions are whole and depthwise."""
    assert {model.cfg.depthwise for model in models} == {False, True}
