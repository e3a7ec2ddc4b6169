"""GPT-2 and GPT-Neo: a tiny config.json of every form."""

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
    "gpt2-labels": {**_gpt2, "architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0, **LABELS},
    "neo": _neo,
    "neo-global": {**_neo, "attention_types": [[["global"], 4]]},
}  # fmt: skip

FEW = ("gpt2", "gpt2-labels", "neo")  # one of each way of naming and storing
