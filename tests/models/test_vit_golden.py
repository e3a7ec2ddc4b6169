"""ViTs, DINOv2s and MAEs against what torch computed once (tests/goldens/make_vit.py): no torch needed."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.close import small
from tests.goldens.stored import Golden
from tests.parity import vit_task

TOLERANCE = 2e-5  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN, STATES = Golden("vit"), 7


@cache
def load(case):
    """Return our module, our parameters, and for each of their numbers its place in the peer's flat vector."""
    model, *found = GOLDEN.load(case)
    if case == "vit-interpolated":
        cfg = model.backbone.cfg
        cfg = replace(cfg, patches=replace(cfg.patches, any_size=True))
        model = model.clone(backbone=model.backbone.clone(cfg=cfg))
    return model, *found


def distances(case, model, params, places=None):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    about, cfg = GOLDEN.peers[case], getattr(model, "backbone", model).cfg
    rows = vit_task.batch(tuple(about["size"]), cfg.patches.channels, cfg.patches.patch_size, cfg.d_model)
    mine = vit_task.ours(model, rows, gradients=places is not None)(params)
    cut = {name: np.ravel(x)[::STATES] if "states" in name else x for name, x in mine["outputs"].items()}
    found = vit_task.distances(
        {**mine, "outputs": cut}, {"outputs": GOLDEN.under(f"{case}/out"), "loss": about["loss"]}
    )
    return found if places is None else found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


@pytest.mark.parametrize("case", GOLDEN.peers)
def test_outputs_hidden_states_loss_and_gradients_are_torchs(case):
    found = distances(case, *load(case))
    print(case, found)
    small(max(found.values()), TOLERANCE)


def test_the_wrong_gelu_and_the_wrong_pool_are_seen():
    model, params, _ = load("vit-labels")
    cfg = model.backbone.cfg
    for wrong in (replace(cfg, mlp=replace(cfg.mlp, activation="gelu_tanh")), replace(cfg, pool="mean")):
        found = distances("vit-labels", model.clone(backbone=model.backbone.clone(cfg=wrong)), params)
        assert found["out"] > 3 * TOLERANCE, found


def test_a_target_that_is_not_standardised_is_seen():
    model, params, _ = load("mae")
    found = distances("mae", model.clone(cfg=replace(model.cfg, standardise=False)), params)
    small(found["out"], TOLERANCE)
    assert found["loss"] > 100 * TOLERANCE, found


def test_every_form_is_covered():
    """The cases differ where the families do."""
    models = [load(case)[0] for case in GOLDEN.peers]
    configs = [getattr(model, "backbone", model).cfg for model in models]
    assert {cfg.norm.epsilon for cfg in configs} == {1e-12, 1e-6}
    assert {cfg.patches.positions for cfg in configs} == {"learned", "sincos"}
    assert {cfg.patches.any_size for cfg in configs} == {False, True}
    assert {cfg.patches.channels for cfg in configs} == {1, 3}
    assert {cfg.patches.resizing for cfg in configs} == {"bicubic", "antialiased"}
    assert {cfg.registers for cfg in configs} == {0, 4}
    assert {cfg.pool for cfg in configs} == {"cls", "both"}
    assert {cfg.mlp.gated for cfg in configs} == {False, True}
    assert {cfg.layer_scale > 0 for cfg in configs} == {False, True}
    assert {type(model).__name__ for model in models} == {"ImageClassifier", "ViT", "MAE"}
    assert {model.cfg.standardise for model in models if type(model).__name__ == "MAE"} == {False, True}
