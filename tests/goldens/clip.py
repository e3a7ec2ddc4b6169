"""How CLIP and SigLIP are compared with what torch computed once.

The file also holds
  CASE/out/NAME  float32: outputs on the images and texts of `clip.rows`; of states every seventh number.
"""

import numpy as np

from tests.goldens.stored import Golden
from tests.parity.distances import distances as apart
from tests.parity.multimodal import clip

TOLERANCE = 5e-5  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN, STATES = Golden("clip"), 7
CASES = ("clip", "clip-largest", "siglip")
load = GOLDEN.load


def kept(case, peer, answer):
    """Return what is told and kept of a case beside its weights and gradients."""
    states = {name: array.ravel()[::STATES] for name, array in answer["states"].items()}
    outputs = {f"out/{name}": array for name, array in (answer["outputs"] | states).items()}
    return {"loss": answer["loss"]}, outputs


def distances(case, model, params, places):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    about, stored = GOLDEN.peers[case], GOLDEN.under(f"{case}/out")
    mine = clip.ours(model, clip.rows(case, about["config"]))(params)
    states = {name: np.ravel(array)[None, ::STATES] for name, array in mine["states"].items()}
    peer = {
        "outputs": {name: stored[name] for name in ("image", "text", "logits")},
        "states": {name: stored[name][None] for name in states},
        "loss": about["loss"],
    }
    found = apart({**mine, "states": states}, peer)
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


WRONG = {
    "erf": ("clip", lambda model: clip.tower(model, "text.mlp", activation="gelu"), {"text": 3, "loss": 3}, ("image",)),
    "a text that cannot look ahead": (
        "siglip", lambda model: clip.tower(model, "text.attention", causal=True), {"text": 100}, ("image",)
    ),
}  # fmt: skip


def covered(models):
    """Assert that the cases differ where the forms do."""
    configs = [model.cfg for model in models]
    assert {cfg.form for cfg in configs} == {"clip", "siglip"}
    assert {cfg.read for cfg in configs} == {"end", "largest", "last"}
    assert {cfg.in_channels for cfg in configs} == {1, 3}
    assert {cfg.text.norm.epsilon for cfg in configs} == {1e-5, 1e-3, 1e-6}
