"""How T5s are compared with what torch computed once (make_t5.py)."""

from dataclasses import replace

import numpy as np

from tests.goldens.stored import Golden
from tests.parity import t5_task

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("t5")
load = GOLDEN.load


def distances(case, model, params, places):
    """Return the largest differences of logits, encoder states and gradients, in units of the peer's."""
    mine = t5_task.ours(model)(params)
    theirs = {name: GOLDEN.arrays[f"{case}/{name}"] for name in ("logits", "encoder")}
    found = t5_task.distances({**mine, "encoder": mine["encoder"][-1]}, {**theirs, "loss": GOLDEN.peers[case]["loss"]})
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


def _changed(change):
    return lambda model: model.clone(cfg=change(model.cfg))


_SEEN = {"logits": 3, "gradients": 3}
WRONG = {
    "erf": ("v1.1", _changed(lambda cfg: replace(cfg, mlp=replace(cfg.mlp, activation="gelu"))), _SEEN, ()),
    "scaled head": ("v1.1", _changed(lambda cfg: replace(cfg, scale_head=True)), _SEEN, ()),
    "scaled attention": (
        "t5", _changed(lambda cfg: replace(cfg, attention=replace(cfg.attention, scale=0.0))), _SEEN, ()
    ),
}  # fmt: skip


def covered(models):
    """Assert that the cases differ where the family does: gates, head, its scale, depths."""
    configs = [model.cfg for model in models]
    assert {(cfg.tied, cfg.scale_head) for cfg in configs} == {(True, True), (True, False), (False, False)}
    assert {(cfg.mlp.activation, cfg.mlp.gated) for cfg in configs} == {("relu", False), ("gelu_tanh", True)}
    assert {np.sign(cfg.num_encoder_layers - cfg.num_decoder_layers) for cfg in configs} == {-1, 0, 1}
    assert any(cfg.attention.num_heads * cfg.attention.head_dim != cfg.d_model for cfg in configs)
