"""Encoders and their heads against what torch computed once (tests/goldens/make_encoder.py): no torch needed."""

from dataclasses import replace

import pytest

from tests.close import small
from tests.goldens.stored import Golden
from tests.parity import encoder_task

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("encoder")


def distances(case, model, params, places):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    about = GOLDEN.peers[case]
    mine = encoder_task.ours(model, encoder_task.batch(**about["asked"]))(params)
    found = encoder_task.distances(mine, {"outputs": GOLDEN.under(f"{case}/out"), "loss": about["loss"]})
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


@pytest.mark.parametrize("case", GOLDEN.peers)
def test_outputs_loss_and_gradients_are_torchs(case):
    found = distances(case, *GOLDEN.load(case))
    print(case, found)
    small(max(found.values()), TOLERANCE)


def test_the_wrong_gelu_is_seen():
    model, params, places = GOLDEN.load("bert-tags")
    cfg = model.backbone.cfg
    wrong = model.clone(backbone=model.backbone.clone(cfg=replace(cfg, mlp=replace(cfg.mlp, activation="gelu_tanh"))))
    found = distances("bert-tags", wrong, params, places)
    assert found["out"] > 3 * TOLERANCE and found["gradients"] > TOLERANCE, found


def test_every_form_is_covered():
    """The cases differ where the families do: types, positions, embeddings, shared layers, heads."""
    models = [GOLDEN.load(case)[0] for case in GOLDEN.peers]
    configs = [model.backbone.cfg for model in models]
    assert {cfg.num_types for cfg in configs} == {0, 1, 2}
    assert {cfg.position_offset for cfg in configs} == {0, 2}
    assert {bool(cfg.embed_size) for cfg in configs} == {False, True}
    assert {cfg.shared for cfg in configs} == {False, True}
    assert {cfg.norm.epsilon for cfg in configs} == {1e-12, 1e-5}
    assert {type(model).__name__ for model in models} == {"MaskedLM", "Classifier", "Tagger", "SpanFinder"}
