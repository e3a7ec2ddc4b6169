"""LLaMA, Mistral, Qwen and Gemma: a tiny config.json of every form."""

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


FORMS = {
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-wide-heads": _llama(head_dim=12),
    "llama-linear": _llama(**_rope("linear", factor=4.0)),
    "llama-llama3": _llama(**_rope("llama3", **_stretched, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-yarn": _llama(**_rope("yarn", **_stretched, beta_fast=8.0, beta_slow=1.0)),
    "llama-labels": _llama(architectures=["LlamaForSequenceClassification"], pad_token_id=0, **LABELS),
    "mistral": _llama("mistral", "Mistral", sliding_window=5),
    "mistral-no-window": _llama("mistral", "Mistral", sliding_window=None),
    "qwen2": _llama("qwen2", "Qwen2"),
    "qwen2-windows": _llama("qwen2", "Qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4,
                            max_window_layers=1),
    "qwen3": _llama("qwen3", "Qwen3", head_dim=8, tie_word_embeddings=True),
    "gemma": _llama("gemma", "Gemma", head_dim=8, num_key_value_heads=1),
}  # fmt: skip

FEW = ("llama", "qwen2-windows", "qwen3", "gemma")  # one of each way of naming and storing
