"""GPT-2 and GPT-Neo: a tiny config.json of every form, and what live torch is compared on."""

from typing import Any

from tests.parity import decoders
from tests.parity.changes import change, part, swap
from tests.parity.decoders import VOCAB, WIDTH
from tests.parity.labels import LABELS

_gpt2 = {
    "model_type": "gpt2", "vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4,
    "architectures": ["GPT2LMHeadModel"],
}  # fmt: skip
_neo = {
    "model_type": "gpt_neo", "vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16, "num_layers": 4,
    "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 5,
    "architectures": ["GPTNeoForCausalLM"],
}  # fmt: skip

FORMS = {
    "gpt2": _gpt2,
    "gpt2-erf-wide": {**_gpt2, "activation_function": "gelu", "n_inner": 24, "attn_pdrop": 0.0, "resid_pdrop": 0.25,
                      "embd_pdrop": 0.25, "layer_norm_epsilon": 1e-6},
    "gpt2-by-depth": {**_gpt2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
                      "tie_word_embeddings": False},
    "gpt2-labels": {**_gpt2, "architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0, **LABELS},
    "neo": _neo,
    "neo-global": {**_neo, "attention_types": [[["global"], 4]]},
}  # fmt: skip

FEW = ("gpt2", "gpt2-by-depth", "gpt2-labels", "neo")  # one of each way of naming and storing

_gpt2_peer = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 3, "n_head": 4}
_neo_peer = {
    "vocab_size": VOCAB, "max_position_embeddings": 32, "hidden_size": WIDTH, "num_layers": 4, "num_heads": 2,
    "attention_types": [[["global", "local"], 2]], "window_size": 5,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _gpt2_peer),
    "gpt2-by-depth": ("GPT2", {**_gpt2_peer, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt2-untied": ("GPT2", {**_gpt2_peer, "scale_attn_weights": False, "tie_word_embeddings": False}),
    "gpt2-wide-mlp-erf": ("GPT2", {**_gpt2_peer, "n_inner": 24, "activation_function": "gelu", "n_head": 2}),
    "neo": ("GPTNeo", _neo_peer),
    "neo-untied": ("GPTNeo", {**_neo_peer, "tie_word_embeddings": False}),
}  # fmt: skip

TOLERANCE = 5e-5  # of the peer's standard deviation, in float32 on CPU: ten times what was measured
INSIDES, tensors = decoders.INSIDES, decoders.tensors
batch, theirs, ours = decoders.batch, decoders.theirs, decoders.ours


def peer(case: str, *, moved: bool = True) -> Any:
    """Return the peer, with every tensor moved."""
    return decoders.build(*CASES[case], moved=moved)


MUTANTS = {
    "erf instead of tanh GELU": ("gpt2", lambda m, p: (part(m, "mlp", activation="gelu"), p)),
    "quick GELU": ("gpt2", lambda m, p: (part(m, "mlp", activation="quick_gelu"), p)),
    "tanh instead of erf GELU": ("gpt2-wide-mlp-erf", lambda m, p: (part(m, "mlp", activation="gelu_tanh"), p)),
    "epsilon 1e-6": ("gpt2", lambda m, p: (part(m, "norm", epsilon=1e-6), p)),
    "no 1/sqrt(K)": ("gpt2", lambda m, p: (part(m, "attention", scale=1.0), p)),
    "1/sqrt(K) where there is none": ("neo", lambda m, p: (part(m, "attention", scale=0.0), p)),
    "1/sqrt(K) in spite of the config": ("gpt2-untied", lambda m, p: (part(m, "attention", scale=0.0), p)),
    "scores not divided by depth": ("gpt2-by-depth", lambda m, p: (change(m, scale_by_depth=False), p)),
    "tied in spite of the config": ("gpt2-untied", lambda m, p: (change(m, tied=True), p)),
    "q and k swapped": ("gpt2", lambda m, p: (m, swap(p, "attn/q/", "attn/k/"))),
    "windows one layer off": ("neo", lambda m, p: (part(m, "attention", windows=(5, 0)), p)),
}
