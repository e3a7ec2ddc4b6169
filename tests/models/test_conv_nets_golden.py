"""ResNets and EfficientNets against what torch computed once (tests/goldens/make_conv_nets.py): no torch needed."""

from dataclasses import replace

import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.objectives import statistics
from tests.close import small
from tests.goldens.stored import Golden
from tests.parity import conv_task, convert

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("conv_nets", every=3)


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


@pytest.mark.parametrize("case", GOLDEN.peers)
def test_logits_loss_and_gradients_are_torchs(case):
    found = distances(case, *GOLDEN.load(case))
    print(case, found)
    small(max(found.values()), TOLERANCE)


@pytest.mark.parametrize("case", [case for case in GOLDEN.peers if case.startswith("resnet")])
def test_a_step_in_training_is_torchs(case):
    found = distances(case, *GOLDEN.load(case), train=True)
    print(case, found)
    small(max(found.values()), TOLERANCE)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("resnet-bottleneck", {"stride_first": True}),
        ("resnet-v1", {"stride_first": False}),
        ("resnet-basic", {"norm_epsilon": 1e-3}),
        ("efficientnet-odd", {"norm_epsilon": 1e-5}),
    ],
)
def test_a_wrong_variant_is_seen(case, change):
    model, params, places = GOLDEN.load(case)
    wrong = model.clone(backbone=model.backbone.clone(cfg=replace(model.backbone.cfg, **change)))
    found = distances(case, wrong, params, places)
    assert min(found["logits"], found["gradients"]) > 3 * TOLERANCE, found
