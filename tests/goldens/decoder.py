"""How decoders are compared with what torch computed once.

The file also holds
  CASE/logits  float32, on the right-padded rows of `batch/...`.
"""

import jax.numpy as jnp

from tests.goldens.stored import Golden
from tests.parity import decoders
from tests.parity.changes import part
from tests.parity.distances import distances as apart

TOLERANCE = 1e-4  # of the standard deviation of torch's logits, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("decoder")
CASES = (
    "gpt2", "gpt2-by-depth", "neo", "llama-llama3", "llama-yarn", "llama-dynamic", "llama-longrope", "llama-biases",
    "mistral", "qwen2-mixed-windows", "qwen3", "gemma",
)  # fmt: skip
load = GOLDEN.load


def beside():
    """Return what the file holds beside its cases."""
    return {f"batch/{name}": field for name, field in decoders.batch("").items()}


def kept(case, peer, answer):
    """Return what is told and kept of a case beside its weights and gradients."""
    return {"loss": answer["loss"]}, answer["outputs"]


def distances(case, model, params, places):
    """Return the largest differences of logits and gradients, in units of the peer's."""
    mine = decoders.ours(model, GOLDEN.under("batch"))(params)
    peer = {"outputs": {"logits": GOLDEN.arrays[f"{case}/logits"]}, "loss": GOLDEN.peers[case]["loss"]}
    found = apart(mine, peer, decoders.INSIDES)
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


WRONG = {"erf": ("gpt2", lambda model: part(model, "mlp", activation="gelu"), {"logits": 3, "gradients": 3}, ())}


def covered(models):
    """Assert that the cases differ where models do: norms, gates, positions, windows, groups, biases, heads."""
    configs = [model.cfg for model in models]
    forms = {
        "norm": {cfg.norm.kind for cfg in configs},
        "offset": {cfg.norm.offset for cfg in configs},
        "gated": {cfg.mlp.gated for cfg in configs},
        "tied": {cfg.tied for cfg in configs},
        "rope": {cfg.attention.rope.scaling if cfg.attention.rope else None for cfg in configs},
        "biased": {(cfg.attention.qkv_bias, cfg.attention.out_bias, cfg.mlp.bias) for cfg in configs},
        "by depth": {cfg.scale_by_depth for cfg in configs},
        "qk_norm": {cfg.attention.qk_norm for cfg in configs},
        "windows": {len(set(cfg.attention.windows)) - (cfg.attention.windows == (0,)) for cfg in configs},
    }
    assert forms == {
        "norm": {"layer", "rms"}, "offset": {0.0, 1.0}, "gated": {False, True}, "tied": {False, True},
        "rope": {None, "none", "llama3", "yarn", "dynamic", "longrope"}, "qk_norm": {False, True},
        "biased": {(True, True, True), (False, True, True), (False, False, False), (True, False, False)},
        "by depth": {False, True},
        "windows": {0, 1, 2},  # none, one for all, by layer
    }  # fmt: skip
    assert jnp.asarray([cfg.attention.num_heads > cfg.attention.num_kv_heads for cfg in configs]).any()
