"""T5 against what torch computed once (tests/goldens/make_t5.py): no torch needed."""

from dataclasses import replace

import numpy as np
import pytest

from tests.close import small
from tests.goldens.stored import Golden
from tests.parity import t5_task

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("t5")


def distances(case, model, params, places):
    """Return the largest differences of logits, encoder states and gradients, in units of the peer's."""
    mine = t5_task.ours(model)(params)
    theirs = {name: GOLDEN.arrays[f"{case}/{name}"] for name in ("logits", "encoder")}
    found = t5_task.distances({**mine, "encoder": mine["encoder"][-1]}, {**theirs, "loss": GOLDEN.peers[case]["loss"]})
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


@pytest.mark.parametrize("case", GOLDEN.peers)
def test_logits_states_loss_and_gradients_are_torchs(case):
    found = distances(case, *GOLDEN.load(case))
    print(case, found)
    small(max(found.values()), TOLERANCE)


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
    model, params, places = GOLDEN.load(case)
    found = distances(case, model.clone(cfg=change(model.cfg)), params, places)
    assert min(found["logits"], found["gradients"]) > 3 * TOLERANCE, found


def test_every_form_is_covered():
    """The cases differ where the family does: gates, head, its scale, depths."""
    configs = [GOLDEN.load(case)[0].cfg for case in GOLDEN.peers]
    assert {(cfg.tied, cfg.scale_head) for cfg in configs} == {(True, True), (True, False), (False, False)}
    assert {(cfg.mlp.activation, cfg.mlp.gated) for cfg in configs} == {("relu", False), ("gelu_tanh", True)}
    assert {np.sign(cfg.num_encoder_layers - cfg.num_decoder_layers) for cfg in configs} == {-1, 0, 1}
    assert any(cfg.attention.num_heads * cfg.attention.head_dim != cfg.d_model for cfg in configs)
