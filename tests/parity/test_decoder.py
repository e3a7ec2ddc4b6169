"""Our decoder against live transformers: logits, every block's output, and the gradient of the loss.

Fresh weights alone would prove little: at initialisation the wrong GELU moves logits by 1e-5 and a lost bias by
nothing. So every case is also run with every tensor moved, and the mutants below must fail.
"""

from dataclasses import replace

import jax
import pytest

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="the live parity tests need torch: pip install torch")
pytest.importorskip("transformers", reason="the live parity tests need transformers: pip install transformers")

from fm_jax.models.language.decoder import Decoder  # noqa: E402
from tests.close import small  # noqa: E402
from tests.parity import convert, peers  # noqa: E402

TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU


def expected(name, *, perturbed):
    model = peers.build(name)
    if perturbed:
        peers.perturb(model, seed=0)
    ours = convert.module(model.config.to_dict())
    params = convert.params(ours, peers.tensors(model))
    return ours.cfg, params, peers.in_our_terms(peers.theirs(model), ours)


@pytest.mark.parametrize("name", peers.CASES)
def test_our_decoder_computes_what_transformers_does(name, record_property):
    compute = None
    for perturbed in (False, True):
        cfg, params, peer = expected(name, perturbed=perturbed)
        shapes = jax.eval_shape(Decoder(cfg).init, jax.random.key(0), peers.batch()["tokens"])["params"]
        unboxed = jax.tree.map(lambda x: x.shape, shapes)
        assert jax.tree.map(lambda x: x.shape, params) == _plain(unboxed)
        compute = compute or peers.ours(cfg)
        found = peers.distances(compute(params), peer)
        record_property("perturbed" if perturbed else "fresh", found)
        print(name, "perturbed" if perturbed else "fresh", {key: f"{value:.1e}" for key, value in found.items()})
        small(max(found.values()), TOLERANCE)


def _plain(boxed):
    return jax.tree.map(lambda x: getattr(x, "value", x), boxed, is_leaf=lambda x: hasattr(x, "value"))


def _swap(params, one, two):
    attn = params["blocks"]["attn"]
    return {**params, "blocks": {**params["blocks"], "attn": {**attn, one: attn[two], two: attn[one]}}}


def _transpose(params, name):
    attn = params["blocks"]["attn"]
    turned = {**attn[name], "kernel": attn[name]["kernel"].swapaxes(1, 2)}
    return {**params, "blocks": {**params["blocks"], "attn": {**attn, name: turned}}}


def _attend(cfg, **changes):
    return replace(cfg, attention=replace(cfg.attention, **changes))


MUTANTS = {
    "erf instead of tanh GELU": ("gpt2", lambda c, p: (replace(c, mlp=replace(c.mlp, activation="gelu")), p)),
    "quick GELU": ("gpt2", lambda c, p: (replace(c, mlp=replace(c.mlp, activation="quick_gelu")), p)),
    "tanh instead of erf GELU": (
        "gpt2-wide-mlp-erf", lambda c, p: (replace(c, mlp=replace(c.mlp, activation="gelu_tanh")), p)
    ),
    "epsilon 1e-6": ("gpt2", lambda c, p: (replace(c, norm=replace(c.norm, epsilon=1e-6)), p)),
    "rms epsilon 1e-5": ("llama", lambda c, p: (replace(c, norm=replace(c.norm, epsilon=1e-5)), p)),
    "no 1/sqrt(K)": ("gpt2", lambda c, p: (_attend(c, scale=1.0), p)),
    "1/sqrt(K) where there is none": ("neo", lambda c, p: (_attend(c, scale=0.0), p)),
    "q and k swapped": ("gpt2", lambda c, p: (c, _swap(p, "q", "k"))),
    "k and v swapped": ("llama", lambda c, p: (c, _swap(p, "k", "v"))),
    "a square kernel not transposed": ("llama", lambda c, p: (c, _transpose(p, "o"))),
    "window one key too wide": ("mistral", lambda c, p: (_attend(c, windows=(6,)), p)),
    "windows one layer off": ("neo", lambda c, p: (_attend(c, windows=(5, 0)), p)),
    "rope base": ("llama", lambda c, p: (_attend(c, rope=replace(c.attention.rope, base=20_000.0)), p)),
    "yarn left out": (
        "llama-yarn", lambda c, p: (_attend(c, rope=replace(c.attention.rope, scaling="none")), p)
    ),
    "norm without its offset": ("gemma", lambda c, p: (replace(c, norm=replace(c.norm, offset=0.0)), p)),
    "embedding not scaled": ("gemma", lambda c, p: (replace(c, scale_embedding=False), p)),
    "no q/k norm": ("qwen3", lambda c, p: (_attend(c, qk_norm=False), _without_head_norms(p))),
}  # fmt: skip


def _without_head_norms(params):
    attn = {name: leaf for name, leaf in params["blocks"]["attn"].items() if not name.startswith("norm_")}
    return {**params, "blocks": {**params["blocks"], "attn": attn}}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_variant_is_seen(mutant):
    name, change = MUTANTS[mutant]
    cfg, params, peer = expected(name, perturbed=True)
    cfg, params = change(cfg, params)
    peer["gradients"] = _matching(peer["gradients"], params)
    found = peers.distances(peers.ours(cfg)(params), peer)
    print(mutant, {key: f"{value:.1e}" for key, value in found.items()})
    assert found["logits"] > 3 * TOLERANCE, found
    assert found["gradients"] > TOLERANCE, found


def _matching(gradients, params):
    """Leave out the gradients of parameters that the mutant does not have."""
    return {
        name: _matching(leaf, params[name]) if isinstance(leaf, dict) else leaf
        for name, leaf in gradients.items()
        if name in params
    }
