"""How ResNets and EfficientNets are compared with what torch computed once.

The file also holds
  CASE/peer       with the images' size, and the losses in evaluation and in training; running moments are tensors;
  CASE/logits     float32: of the images of `conv_nets.images`, in evaluation;
  CASE/train/...  logits and gradients of a ResNet in training, and "after": its running moments after the step.
"""

import numpy as np

from fm_jax.core import statistics, tree
from tests.goldens.stored import Golden, flat
from tests.parity import conv_nets, convert
from tests.parity.all_families import FAMILY
from tests.parity.changes import cfg, change
from tests.parity.distances import distances as apart

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("conv_nets", every=3)
TRAINED = ("resnet-basic", "resnet-v1", "resnet-bottleneck")  # in training too
CASES = (*TRAINED, "resnet-v1-halved-early", "efficientnet-even", "efficientnet-odd")
load = GOLDEN.load


def kept(case, peer, answer):
    """Return what is told and kept of a case beside its weights and gradients."""
    told, found = {"size": FAMILY[case].CASES[case][2], "losses": [answer["loss"]]}, dict(answer["outputs"])
    if case in TRAINED:
        names, trained = sorted(conv_nets.tensors(peer)), FAMILY[case].theirs(case, peer, train=True)
        told["losses"].append(trained["loss"])
        found["train/logits"] = trained["outputs"]["logits"]
        found["train/gradients"] = flat(trained["gradients"], names)[:: GOLDEN.every]
        found["train/after"] = flat(trained["after"], [name for name in names if "running_" in name])
    return told, found


def moved(case, model):
    """Return the peer's running moments after a step, under our names."""
    zeros = GOLDEN.named(case, np.zeros_like(GOLDEN.arrays[f"{case}/weights"], np.float32))
    after, start = GOLDEN.arrays[f"{case}/train/after"], 0
    for name, tensor in zeros.items():
        if "running_" in name:
            zeros[name] = after[start : start + tensor.size]
            start += tensor.size
    assert start == after.size
    return tree.flatten(statistics.split(convert.params(model, zeros))[1])


def distances(case, model, params, places, *, train=False):
    """Return the largest differences of logits, gradients and running moments, in units of the peer's."""
    about, where = GOLDEN.peers[case], f"{case}/train" if train else case
    rows = conv_nets.images(tuple(about["size"]), cfg(model).in_channels)
    mine = conv_nets.ours(model, rows, train=train)(params)
    peer = {"outputs": {"logits": GOLDEN.arrays[f"{where}/logits"]}, "loss": about["losses"][train]}
    if train:
        peer["statistics"] = moved(case, model)
    return apart(mine, peer) | {"gradients": GOLDEN.steepest(where, mine["gradients"], places)}


_SEEN = {"logits": 3, "gradients": 3}
WRONG = {
    "v1": ("resnet-bottleneck", lambda model: change(model, stride_first=True), _SEEN, ()),
    "v1.5": ("resnet-v1", lambda model: change(model, stride_first=False), _SEEN, ()),
    "a resnet's epsilon": ("resnet-basic", lambda model: change(model, norm_epsilon=1e-3), _SEEN, ()),
    "an efficientnet's epsilon": ("efficientnet-odd", lambda model: change(model, norm_epsilon=1e-5), _SEEN, ()),
}


def covered(models):
    """Assert that the cases differ where the families do: blocks, and where they stride."""
    configs = [model.backbone.cfg for model in models]
    assert {type(model.backbone).__name__ for model in models} == {"ResNet", "EfficientNet"}
    resnets = [cfg for cfg in configs if hasattr(cfg, "block")]
    assert {(cfg.block, cfg.stride_first) for cfg in resnets} == {
        ("basic", False), ("bottleneck", False), ("bottleneck", True)
    }  # fmt: skip
    assert {cfg.first_stride for cfg in resnets} == {1, 2}
