"""Encoders and their heads against what torch computed once (tests/goldens/make_encoder.py): no torch needed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core import tree
from tests.parity import convert, encoder_task

FILE = Path(__file__).parents[1] / "goldens" / "encoder.npz"
TOLERANCE = 5e-5  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
EVERY = 5

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


def distances(case, model, params, places):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    mine = encoder_task.ours(model, encoder_task.batch(**told(case)["asked"]))(params)
    outputs = {name.split("/")[2]: array for name, array in GOLDEN.items() if name.startswith(f"{case}/out/")}
    found = encoder_task.distances(mine, {"outputs": outputs, "loss": told(case)["loss"]})
    theirs, got = GOLDEN[f"{case}/gradients"], np.zeros_like(GOLDEN[f"{case}/gradients"])
    for path, leaf in tree.flatten(mine["gradients"]).items():
        place = np.asarray(tree.flatten(places)[path]).astype(int).ravel()
        kept = place % EVERY == 0
        got[place[kept] // EVERY] = np.asarray(leaf).ravel()[kept]
    return found | {"gradients": float(np.linalg.norm(got - theirs) / np.linalg.norm(theirs))}


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_are_torchs(case):
    found = distances(case, *load(case))
    assert max(found.values()) < TOLERANCE, found


def test_the_wrong_gelu_is_seen():
    model, params, places = load("bert-tags")
    cfg = model.backbone.cfg
    wrong = model.clone(backbone=model.backbone.clone(cfg=replace(cfg, mlp=replace(cfg.mlp, activation="gelu_tanh"))))
    found = distances("bert-tags", wrong, params, places)
    assert min(found["out"], found["gradients"]) > 2 * TOLERANCE, found


def test_every_form_is_covered():
    """The cases differ where the families do: types, positions, embeddings, shared layers, heads."""
    models = [load(case)[0] for case in CASES]
    configs = [model.backbone.cfg for model in models]
    assert {cfg.num_types for cfg in configs} == {0, 1, 2}
    assert {cfg.position_offset for cfg in configs} == {0, 2}
    assert {bool(cfg.embed_size) for cfg in configs} == {False, True}
    assert {cfg.shared for cfg in configs} == {False, True}
    assert {cfg.norm.epsilon for cfg in configs} == {1e-12, 1e-5}
    assert {type(model).__name__ for model in models} == {"MaskedLM", "Classifier", "Tagger", "SpanFinder"}
