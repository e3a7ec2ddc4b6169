"""The decoder against what torch computed once (tests/goldens/make_decoder.py): no torch needed."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.models.language.decoder import Decoder
from tests.parity import convert

FILE = Path(__file__).parents[1] / "goldens" / "decoder.npz"
TOLERANCE = 5e-5  # of the standard deviation of torch's logits, or of its gradient's norm; float32 on CPU
EVERY = 5

with np.load(FILE) as stored:
    GOLDEN = dict(stored)
CASES = sorted({name.split("/")[0] for name in GOLDEN} - {"batch"})
BATCH = {name.removeprefix("batch/"): field for name, field in GOLDEN.items() if name.startswith("batch/")}


def named(case, flat):
    """Cut a flat vector into the peer's tensors."""
    found, start = {}, 0
    for name, shape in json.loads(str(GOLDEN[f"{case}/peer"]))["tensors"]:
        found[name] = flat[start : start + np.prod(shape, dtype=int)].reshape(shape)
        start += found[name].size
    assert start == flat.size
    return found


def load(case):
    """Return our config, our parameters, and for each of their numbers its place in the peer's flat vector."""
    peer = json.loads(str(GOLDEN[f"{case}/peer"]))["config"]
    model = convert.module(peer)
    weights = GOLDEN[f"{case}/weights"].astype(np.float32)
    return model.cfg, *(convert.params(model, named(case, x)) for x in (weights, np.arange(weights.size)))


def distances(case, cfg, params, places):
    """Return the largest differences of logits and gradients, in units of the peer's."""
    model = Decoder(cfg)

    @jax.jit
    def compute(params):
        def mean(params):
            logits = model.apply({"params": params}, BATCH["tokens"])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["targets"][..., None], axis=-1)[..., 0]
            return -(picked * BATCH["weights"]).sum() / BATCH["weights"].sum(), logits

        return jax.value_and_grad(mean, has_aux=True)(params)

    (loss, logits), gradients = compute(params)
    inside = np.arange(BATCH["tokens"].shape[1]) < (BATCH["weights"].sum(axis=1, keepdims=True) + 1)
    want = GOLDEN[f"{case}/logits"][inside]
    mine = np.zeros_like(GOLDEN[f"{case}/gradients"])
    for path, leaf in tree.flatten(gradients).items():
        place = tree.flatten(places)[path].astype(int).ravel()
        kept = place % EVERY == 0
        mine[place[kept] // EVERY] = np.asarray(leaf).ravel()[kept]
    theirs = GOLDEN[f"{case}/gradients"]
    peer_loss = json.loads(str(GOLDEN[f"{case}/peer"]))["loss"]
    return {
        "logits": float(np.abs(np.asarray(logits)[inside] - want).max() / want.std()),
        "loss": abs(float(loss) - peer_loss),
        "gradients": float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)),
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_torchs(case):
    found = distances(case, *load(case))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("case", ["gpt2"])
def test_the_wrong_gelu_is_seen(case):
    cfg, params, places = load(case)
    found = distances(case, replace(cfg, mlp=replace(cfg.mlp, activation="gelu")), params, places)
    assert min(found["logits"], found["gradients"]) > 2 * TOLERANCE, found


def test_every_kind_of_block_is_covered():
    """The cases differ where models do: norms, gates, positions, windows, groups, biases, heads."""
    configs = [load(case)[0] for case in CASES]
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
