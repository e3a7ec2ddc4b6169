"""How ViTs, DINOv2s and MAEs are compared with what torch computed once.

The file also holds
  CASE/peer      with the images' size; the tensors are those of the weights file;
  CASE/out/NAME  float32: outputs on the images of `vit.images`; of states every seventh number.
"""

from dataclasses import replace

import numpy as np

from fm_jax.core.types import backbone
from tests.goldens.stored import Golden
from tests.parity.changes import cfg, change, part
from tests.parity.distances import distances as apart
from tests.parity.vision import vit

TOLERANCE = 2e-5  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN, STATES = Golden("vit"), 7
CASES = (
    "vit-labels", "vit-oblong", "vit-interpolated", "dinov2", "dinov2-gated", "registers-labels", "mae", "mae-pixels",
)  # fmt: skip
load = GOLDEN.load


def kept(case, peer, answer):
    """Return what is told and kept of a case beside its weights and gradients."""
    states = {name: array.ravel()[::STATES] for name, array in answer["states"].items()}
    outputs = {f"out/{name}": array for name, array in (answer["outputs"] | states).items()}
    return {"loss": answer["loss"], "size": vit.CASES[case][3]}, outputs


def distances(case, model, params, places):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    about, patches = GOLDEN.peers[case], cfg(model).patches
    rows = vit.images(tuple(about["size"]), patches.channels, patches.patch_size, cfg(model).d_model)
    mine = vit.ours(model, rows)(params)
    states = {name: np.ravel(array)[None, ::STATES] for name, array in mine["states"].items()}
    stored = GOLDEN.under(f"{case}/out")
    peer = {
        "outputs": {"out": stored.pop("out")},
        "states": {name: array[None] for name, array in stored.items()},
        "loss": about["loss"],
    }
    found = apart({**mine, "states": states}, peer)
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


def _pixels(model):
    return model.clone(cfg=replace(model.cfg, standardise=False))


WRONG = {
    "tanh": ("vit-labels", lambda model: part(model, "mlp", activation="gelu_tanh"), {"out": 3}, ()),
    "mean": ("vit-labels", lambda model: change(model, pool="mean"), {"out": 3}, ()),
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
