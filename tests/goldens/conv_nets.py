"""How ResNets and EfficientNets are compared with what torch computed once (make_conv_nets.py)."""

from dataclasses import replace

import numpy as np

from fm_jax.core import statistics, tree
from tests.goldens.stored import Golden
from tests.parity import conv_task, convert

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("conv_nets", every=3)
TRAINED = tuple(case for case in GOLDEN.peers if case.startswith("resnet"))  # in training too
load = GOLDEN.load


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
    rows = conv_task.batch(tuple(about["size"]), model.backbone.cfg.in_channels)
    mine = conv_task.ours(model, rows, train=train)(params)
    peer = {"logits": GOLDEN.arrays[f"{where}/logits"], "loss": about["losses"][train]}
    if train:
        peer["statistics"] = moved(case, model)
    return conv_task.distances(mine, peer) | {"gradients": GOLDEN.steepest(where, mine["gradients"], places)}


def _changed(**changes):
    return lambda model: model.clone(backbone=model.backbone.clone(cfg=replace(model.backbone.cfg, **changes)))


_SEEN = {"logits": 3, "gradients": 3}
WRONG = {
    "v1": ("resnet-bottleneck", _changed(stride_first=True), _SEEN, ()),
    "v1.5": ("resnet-v1", _changed(stride_first=False), _SEEN, ()),
    "a resnet's epsilon": ("resnet-basic", _changed(norm_epsilon=1e-3), _SEEN, ()),
    "an efficientnet's epsilon": ("efficientnet-odd", _changed(norm_epsilon=1e-5), _SEEN, ()),
}


def covered(models):
    """Assert that the cases differ where the families do: blocks, and where they stride."""
    configs = [model.backbone.cfg for model in models]
    assert {type(model.backbone).__name__ for model in models} == {"ResNet", "EfficientNet"}
    resnets = [cfg for cfg in configs if hasattr(cfg, "block")]
    assert {(cfg.block, cfg.stride_first) for cfg in resnets} == {
        ("basic", False), ("bottleneck", False), ("bottleneck", True)
    }  # fmt: skip
