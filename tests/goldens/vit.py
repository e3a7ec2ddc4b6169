"""How ViTs, DINOv2s and MAEs are compared with what torch computed once (make_vit.py)."""

from dataclasses import replace
from functools import cache

import numpy as np

from fm_jax.core.types import backbone
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
    about, cfg = GOLDEN.peers[case], backbone(model).cfg
    rows = vit_task.batch(tuple(about["size"]), cfg.patches.channels, cfg.patches.patch_size, cfg.d_model)
    mine = vit_task.ours(model, rows, gradients=places is not None)(params)
    cut = {name: np.ravel(x)[::STATES] if "states" in name else x for name, x in mine["outputs"].items()}
    found = vit_task.distances(
        {**mine, "outputs": cut}, {"outputs": GOLDEN.under(f"{case}/out"), "loss": about["loss"]}
    )
    return found if places is None else found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


def _changed(change):
    return lambda model: model.clone(backbone=model.backbone.clone(cfg=change(model.backbone.cfg)))


def _tanh(cfg):
    return replace(cfg, mlp=replace(cfg.mlp, activation="gelu_tanh"))


def _pixels(model):
    return model.clone(cfg=replace(model.cfg, standardise=False))


WRONG = {
    "tanh": (
        "vit-labels",
        _changed(_tanh),
        {"out": 3},
        (),
    ),
    "mean": ("vit-labels", _changed(lambda cfg: replace(cfg, pool="mean")), {"out": 3}, ()),
    "a target that is not standardised": ("mae", _pixels, {"loss": 100}, ("out",)),
}


def covered(models):
    """Assert that the cases differ where the families do."""
    configs = [backbone(model).cfg for model in models]
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
