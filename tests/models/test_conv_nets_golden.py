"""ResNets and EfficientNets against what torch computed once (tests/goldens/make_conv_nets.py): no torch needed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.objectives import statistics
from tests.parity import conv_task, convert

FILE = Path(__file__).parents[1] / "goldens" / "conv_nets.npz"
TOLERANCE = 5e-5  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
EVERY = 3

with np.load(FILE) as stored:
    GOLDEN = dict(stored)
CASES = sorted({name.split("/")[0] for name in GOLDEN})


def told(case):
    return json.loads(str(GOLDEN[f"{case}/peer"]))


def named(case, flat):
    """Cut a flat vector into the peer's tensors."""
    found, start = {}, 0
    for name, shape in told(case)["tensors"]:
        found[name] = flat[start : start + np.prod(shape, dtype=int)].reshape(shape)
        start += found[name].size
    assert start == flat.size
    return found


def load(case):
    """Return our module, our parameters, and for each of their numbers its place in the peer's flat vector."""
    model = convert.module(told(case)["config"])
    weights = GOLDEN[f"{case}/weights"].astype(np.float32)
    return model, *(convert.params(model, named(case, x)) for x in (weights, np.arange(weights.size)))


def moved(case, model):
    """Return the peer's running moments after a step, under our names."""
    zeros = named(case, np.zeros_like(GOLDEN[f"{case}/weights"], np.float32))
    after, start = GOLDEN[f"{case}/train/after"], 0
    for name, tensor in zeros.items():
        if "running_" in name:
            zeros[name] = after[start : start + tensor.size]
            start += tensor.size
    assert start == after.size
    return tree.flatten(statistics.split(convert.params(model, zeros))[1])


def distances(case, model, params, places, *, train=False):
    """Return the largest differences of logits, gradients and running moments, in units of the peer's."""
    about, prefix = told(case), f"{case}/train/" if train else f"{case}/"
    rows = conv_task.batch(tuple(about["size"]), model.backbone.cfg.in_channels)
    mine = conv_task.ours(model, rows, train=train)(params)
    peer = {"logits": GOLDEN[prefix + "logits"], "loss": about["losses"][train]}
    if train:
        peer["statistics"] = moved(case, model)
    found = conv_task.distances(mine, peer)
    theirs, got = GOLDEN[prefix + "gradients"], np.zeros_like(GOLDEN[prefix + "gradients"])
    for path, leaf in tree.flatten(mine["gradients"]).items():
        place = np.asarray(tree.flatten(places)[path]).astype(int).ravel()
        kept = place % EVERY == 0
        got[place[kept] // EVERY] = np.asarray(leaf).ravel()[kept]
    return found | {"gradients": float(np.linalg.norm(got - theirs) / np.linalg.norm(theirs))}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_torchs(case):
    found = distances(case, *load(case))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("resnet")])
def test_a_step_in_training_is_torchs(case):
    found = distances(case, *load(case), train=True)
    assert max(found.values()) < TOLERANCE, found


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
    model, params, places = load(case)
    wrong = model.clone(backbone=model.backbone.clone(cfg=replace(model.backbone.cfg, **change)))
    found = distances(case, wrong, params, places)
    assert min(found["logits"], found["gradients"]) > 2 * TOLERANCE, found
