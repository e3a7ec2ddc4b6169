"""How encoders and their heads are compared with what torch computed once (make_encoder.py)."""

from dataclasses import replace

from tests.goldens.stored import Golden
from tests.parity import encoder_task

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("encoder")
load = GOLDEN.load


def distances(case, model, params, places):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    about = GOLDEN.peers[case]
    mine = encoder_task.ours(model, encoder_task.batch(**about["asked"]))(params)
    found = encoder_task.distances(mine, {"outputs": GOLDEN.under(f"{case}/out"), "loss": about["loss"]})
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


def _tanh(model):
    cfg = model.backbone.cfg
    return model.clone(backbone=model.backbone.clone(cfg=replace(cfg, mlp=replace(cfg.mlp, activation="gelu_tanh"))))


WRONG = {"tanh": ("bert-tags", _tanh, {"out": 3, "gradients": 1}, ())}


def covered(models):
    """Assert that the cases differ where the families do: types, positions, embeddings, shared layers, heads."""
    configs = [model.backbone.cfg for model in models]
    assert {cfg.num_types for cfg in configs} == {0, 1, 2}
    assert {cfg.position_offset for cfg in configs} == {0, 2}
    assert {bool(cfg.embed_size) for cfg in configs} == {False, True}
    assert {cfg.shared for cfg in configs} == {False, True}
    assert {cfg.norm.epsilon for cfg in configs} == {1e-12, 1e-5}
    assert {type(model).__name__ for model in models} == {"MaskedLM", "Classifier", "Tagger", "SpanFinder"}
