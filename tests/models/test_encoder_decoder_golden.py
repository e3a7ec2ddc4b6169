"""T5 against what torch computed once (tests/goldens/make_t5.py): no torch needed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core import tree
from tests.parity import convert, t5_task

FILE = Path(__file__).parents[1] / "goldens" / "t5.npz"
TOLERANCE = 5e-5  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
EVERY = 5

with np.load(FILE) as stored:
    GOLDEN = {name: array for name, array in stored.items() if not name.startswith("buckets/")}
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
    """Return the largest differences of logits, encoder states and gradients, in units of the peer's."""
    mine = t5_task.ours(model)(params)
    theirs = {name: GOLDEN[f"{case}/{name}"] for name in ("logits", "encoder")} | {"loss": told(case)["loss"]}
    found = t5_task.distances({**mine, "encoder": mine["encoder"][-1]}, theirs)
    want = GOLDEN[f"{case}/gradients"]
    got = np.zeros_like(want)
    for path, leaf in tree.flatten(mine["gradients"]).items():
        place = np.asarray(tree.flatten(places)[path]).astype(int).ravel()
        kept = place % EVERY == 0
        got[place[kept] // EVERY] = np.asarray(leaf).ravel()[kept]
    return found | {"gradients": float(np.linalg.norm(got - want) / np.linalg.norm(want))}


@pytest.mark.parametrize("case", CASES)
def test_logits_states_loss_and_gradients_are_torchs(case):
    found = distances(case, *load(case))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("v1.1", lambda cfg: replace(cfg, mlp=replace(cfg.mlp, activation="gelu"))),
        ("v1.1", lambda cfg: replace(cfg, scale_head=True)),
        ("t5", lambda cfg: replace(cfg, attention=replace(cfg.attention, scale=0.0))),
    ],
    ids=["erf", "scaled head", "scaled attention"],
)
def test_a_wrong_variant_is_seen(case, change):
    model, params, places = load(case)
    found = distances(case, model.clone(cfg=change(model.cfg)), params, places)
    assert min(found["logits"], found["gradients"]) > 2 * TOLERANCE, found


def test_every_form_is_covered():
    """The cases differ where the family does: gates, head, its scale, depths."""
    configs = [load(case)[0].cfg for case in CASES]
    assert {(cfg.tied, cfg.scale_head) for cfg in configs} == {(True, True), (True, False), (False, False)}
    assert {(cfg.mlp.activation, cfg.mlp.gated) for cfg in configs} == {("relu", False), ("gelu_tanh", True)}
    assert {np.sign(cfg.num_encoder_layers - cfg.num_decoder_layers) for cfg in configs} == {-1, 0, 1}
    assert any(cfg.attention.num_heads * cfg.attention.head_dim != cfg.d_model for cfg in configs)
