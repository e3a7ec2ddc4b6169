"""The decoder against what torch computed once (tests/goldens/make_decoder.py): no torch needed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models.language.decoder import Decoder
from tests.close import small
from tests.goldens.stored import Golden
from tests.parity.gradients import apart

TOLERANCE = 1e-4  # of the standard deviation of torch's logits, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("decoder")
BATCH = GOLDEN.under("batch")


def distances(case, model, params, places):
    """Return the largest differences of logits and gradients, in units of the peer's."""

    @jax.jit
    def compute(params):
        def mean(params):
            logits = model.apply({"params": params}, BATCH["tokens"])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["targets"][..., None], axis=-1)[..., 0]
            return -(picked * BATCH["weights"]).sum() / BATCH["weights"].sum(), logits

        return jax.value_and_grad(mean, has_aux=True)(params)

    (loss, logits), gradients = compute(params)
    inside = np.arange(BATCH["tokens"].shape[1]) < (BATCH["weights"].sum(axis=1, keepdims=True) + 1)
    want = GOLDEN.arrays[f"{case}/logits"][inside]
    return {
        "logits": float(np.abs(np.asarray(logits)[inside] - want).max() / want.std()),
        "loss": apart(loss, GOLDEN.peers[case]["loss"]),
        "gradients": GOLDEN.steepest(case, gradients, places),
    }


@pytest.mark.parametrize("case", GOLDEN.peers)
def test_logits_and_gradients_are_torchs(case):
    found = distances(case, *GOLDEN.load(case))
    print(case, found)
    small(max(found.values()), TOLERANCE)


@pytest.mark.parametrize("case", ["gpt2"])
def test_the_wrong_gelu_is_seen(case):
    model, params, places = GOLDEN.load(case)
    cfg = model.cfg
    found = distances(case, Decoder(replace(cfg, mlp=replace(cfg.mlp, activation="gelu"))), params, places)
    assert min(found["logits"], found["gradients"]) > 3 * TOLERANCE, found


def test_every_kind_of_block_is_covered():
    """The cases differ where models do: norms, gates, positions, windows, groups, biases, heads."""
    configs = [GOLDEN.load(case)[0].cfg for case in GOLDEN.peers]
    forms = {
        "norm": {cfg.norm.kind for cfg in configs},
        "offset": {cfg.norm.offset for cfg in configs},
        "gated": {cfg.mlp.gated for cfg in configs},
        "tied": {cfg.tied for cfg in configs},
        "rope": {cfg.attention.rope.scaling if cfg.attention.rope else None for cfg in configs},
        "biased": {cfg.attention.qkv_bias for cfg in configs},
        "qk_norm": {cfg.attention.qk_norm for cfg in configs},
        "windows": {len(set(cfg.attention.windows)) - (cfg.attention.windows == (0,)) for cfg in configs},
    }
    assert forms == {
        "norm": {"layer", "rms"}, "offset": {0.0, 1.0}, "gated": {False, True}, "tied": {False, True},
        "rope": {None, "none", "llama3", "yarn"}, "biased": {False, True}, "qk_norm": {False, True},
        "windows": {0, 1, 2},  # none, one for all, by layer
    }  # fmt: skip
    assert jnp.asarray([cfg.attention.num_heads > cfg.attention.num_kv_heads for cfg in configs]).any()
