"""LLaMA, Mistral, Qwen and Gemma: a tiny config.json of every form, and what live torch is compared on."""

from dataclasses import replace
from typing import Any

import numpy as np

from fm_jax.core import tree
from tests.parity import decoders
from tests.parity.changes import cfg, change, edit, part, swap, turned
from tests.parity.decoders import VOCAB, WIDTH
from tests.parity.labels import LABELS

_stretched = {"factor": 4.0, "original_max_position_embeddings": 64}


def _llama(kind="llama", stem="Llama", **more):
    return {
        "model_type": kind, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "architectures": [f"{stem}ForCausalLM"], **more,
    }  # fmt: skip


def _rope(kind, **more):
    return {"head_dim": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 5_000.0, **more}}


_divisors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
_biases = {"attention_bias": True, "mlp_bias": True}


FORMS = {
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-wide-heads": _llama(head_dim=12),
    "llama-linear": _llama(**_rope("linear", factor=4.0)),
    "llama-llama3": _llama(**_rope("llama3", **_stretched, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-dynamic": _llama(max_position_embeddings=32, **_rope("dynamic", factor=2.0)),
    "llama-yarn": _llama(
        **_rope("yarn", **_stretched, beta_fast=8.0, beta_slow=1.0, attention_factor=1.3, truncate=False)
    ),
    "llama-longrope-biases": _llama(**_biases, **_rope("longrope", **_stretched, **_divisors)),
    "llama-labels": _llama(architectures=["LlamaForSequenceClassification"], pad_token_id=0, **LABELS),
    "mistral": _llama("mistral", "Mistral", sliding_window=5),
    "mistral-no-window": _llama("mistral", "Mistral", sliding_window=None),
    "qwen2": _llama("qwen2", "Qwen2"),
    "qwen2-windows": _llama("qwen2", "Qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4,
                            max_window_layers=1),
    "qwen3": _llama("qwen3", "Qwen3", head_dim=8, tie_word_embeddings=True),
    "gemma": _llama("gemma", "Gemma", head_dim=8, num_key_value_heads=1),
}  # fmt: skip

FEW = ("llama", "llama-longrope-biases", "qwen2-windows", "qwen3", "gemma")  # one of each way of naming and storing

_peer = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 28, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# 64 trained positions and 8-wide heads: with 4 turned pairs the stretched, kept and blended ones all occur
_long = {"head_dim": 8, "max_position_embeddings": 256}
_beyond = {"factor": 4.0, "original_max_position_embeddings": 16}  # fewer than the rows have


def _turns(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _peer),
    "llama-tied-full-heads": ("Llama", {**_peer, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {**_peer, **_long, **_turns("linear", factor=4.0)}),
    "llama-llama3": (
        "Llama", {**_peer, **_long, **_turns("llama3", **_stretched, low_freq_factor=1.0, high_freq_factor=4.0)}
    ),
    "llama-yarn": ("Llama", {**_peer, **_long, **_turns("yarn", **_stretched, beta_fast=8.0, beta_slow=1.0)}),
    "llama-yarn-given": (
        "Llama",
        {**_peer, **_long, **_turns("yarn", **_stretched, beta_fast=8.0, attention_factor=1.3, truncate=False)},
    ),
    "llama-yarn-mscale": (
        "Llama", {**_peer, **_long, **_turns("yarn", **_stretched, beta_fast=8.0, mscale=2.0, mscale_all_dim=0.5)}
    ),
    "llama-dynamic": (
        "Llama", {**_peer, "head_dim": 8, "max_position_embeddings": 16, **_turns("dynamic", factor=2.0)}
    ),
    "llama-dynamic-short": ("Llama", {**_peer, "head_dim": 8, **_turns("dynamic", factor=2.0)}),
    "llama-longrope": ("Llama", {**_peer, "head_dim": 8, **_turns("longrope", **_beyond, **_divisors)}),
    "llama-longrope-short": ("Llama", {**_peer, **_long, **_turns("longrope", **_stretched, **_divisors)}),
    "llama-biases": ("Llama", {**_peer, **_biases}),
    "qwen3-biases": ("Qwen3", {**_peer, "head_dim": 8, "attention_bias": True}),
    "mistral": ("Mistral", {**_peer, "sliding_window": 5, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", _peer),
    "qwen2-mixed-windows": (
        "Qwen2",
        {**_peer, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_peer, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**_peer, "head_dim": 8, "num_key_value_heads": 1}),
}  # fmt: skip

TOLERANCE = 5e-5  # of the peer's standard deviation, in float32 on CPU: ten times what was measured
INSIDES, tensors = decoders.INSIDES, decoders.tensors
batch, theirs, ours = decoders.batch, decoders.theirs, decoders.ours


def peer(case: str, *, moved: bool = True) -> Any:
    """Return the peer, with every tensor moved."""
    return decoders.build(*CASES[case], moved=moved)


def _turning(model, **changes):
    return part(model, "attention", rope=replace(cfg(model).attention.rope, **changes))


def _without_head_norms(params):
    flat = tree.flatten(params)
    return tree.unflatten({path: leaf for path, leaf in flat.items() if "attn/norm_" not in path})


MUTANTS = {
    "rms epsilon 1e-5": ("llama", lambda m, p: (part(m, "norm", epsilon=1e-5), p)),
    "k and v swapped": ("llama", lambda m, p: (m, swap(p, "attn/k/", "attn/v/"))),
    "a square kernel not transposed": ("llama", lambda m, p: (m, edit(p, "attn/o/kernel", turned))),
    "window one key too wide": ("mistral", lambda m, p: (part(m, "attention", windows=(6,)), p)),
    "rope base": ("llama", lambda m, p: (_turning(m, base=20_000.0), p)),
    "yarn left out": ("llama-yarn", lambda m, p: (_turning(m, scaling="none"), p)),
    "yarn truncated": ("llama-yarn-given", lambda m, p: (_turning(m, truncate=True), p)),
    "yarn's own attention factor": ("llama-yarn-given", lambda m, p: (_turning(m, attention_factor=0.0), p)),
    "mscale left out": ("llama-yarn-mscale", lambda m, p: (_turning(m, attention_factor=0.0), p)),
    "dynamic left out": ("llama-dynamic", lambda m, p: (_turning(m, scaling="none"), p)),
    "dynamic one position late": ("llama-dynamic", lambda m, p: (_turning(m, original_length=17), p)),
    "longrope's short divisors": ("llama-longrope", lambda m, p: (_turning(m, original_length=24), p)),
    "longrope without its magnitude": ("llama-longrope", lambda m, p: (_turning(m, attention_factor=1.0), p)),
    "no output bias": ("llama-biases", lambda m, p: (m, edit(p, "attn/o/bias", np.zeros_like))),
    "no bias in the gate": ("llama-biases", lambda m, p: (m, edit(p, "mlp/gate/bias", np.zeros_like))),
    "norm without its offset": ("gemma", lambda m, p: (part(m, "norm", offset=0.0), p)),
    "embedding not scaled": ("gemma", lambda m, p: (change(m, scale_embedding=False), p)),
    "no q/k norm": ("qwen3", lambda m, p: (part(m, "attention", qk_norm=False), _without_head_norms(p))),
}
