"""How T5s are compared with what torch computed once.

The file also holds
  CASE/logits, CASE/encoder  float32, on the rows of `t5.batch`; the latter are the encoder's final states;
and buckets/COUNT-DISTANCE/both and /causal int8: the bucket of each offset from -2048 to 2048
(tests/ops/test_positions.py).
"""

import numpy as np

from tests.goldens.stored import Golden
from tests.parity.changes import change, part
from tests.parity.distances import distances as apart
from tests.parity.language import t5

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("t5")
CASES = ("t5", "t5-uneven", "v1.1", "v1.1-tied", "mt5")
BUCKETS = ((32, 128), (8, 16), (64, 256))
load = GOLDEN.load


def beside():
    """Return what the file holds beside its cases."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets, found = torch.arange(-2048, 2049), {}
    for count, distance in BUCKETS:
        for name, both in (("both", True), ("causal", False)):
            buckets = T5Attention._relative_position_bucket(offsets, both, count, distance)
            found[f"buckets/{count}-{distance}/{name}"] = buckets.numpy().astype(np.int8)
    return found


def kept(case, peer, answer):
    """Return what is told and kept of a case beside its weights and gradients."""
    return {"loss": answer["loss"]}, {**answer["outputs"], "encoder": answer["states"]["encoder"][-1]}


def distances(case, model, params, places):
    """Return the largest differences of logits, the encoder's last states and gradients, in units of the peer's."""
    mine = t5.ours(model, t5.batch(case))(params)
    last = {"encoder": mine["states"]["encoder"][-1:]}
    peer = {
        "outputs": {"logits": GOLDEN.arrays[f"{case}/logits"]},
        "states": {"encoder": GOLDEN.arrays[f"{case}/encoder"][None]},
        "loss": GOLDEN.peers[case]["loss"],
    }
    found = apart({**mine, "states": last}, peer, t5.INSIDES)
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


_SEEN = {"logits": 3, "gradients": 3}
WRONG = {
    "erf": ("v1.1", lambda model: part(model, "mlp", activation="gelu"), _SEEN, ()),
    "scaled head": ("v1.1", lambda model: change(model, scale_head=True), _SEEN, ()),
    "scaled attention": ("t5", lambda model: part(model, "attention", scale=0.0), _SEEN, ()),
}


def covered(models):
    """Assert that the cases differ where the family does: gates, head, its scale, depths."""
    configs = [model.cfg for model in models]
    assert {(cfg.tied, cfg.scale_head) for cfg in configs} == {(True, True), (True, False), (False, False)}
    assert {(cfg.mlp.activation, cfg.mlp.gated) for cfg in configs} == {("relu", False), ("gelu_tanh", True)}
    assert {np.sign(cfg.num_encoder_layers - cfg.num_decoder_layers) for cfg in configs} == {-1, 0, 1}
    assert any(cfg.attention.num_heads * cfg.attention.head_dim != cfg.d_model for cfg in configs)
