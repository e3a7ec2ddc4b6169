"""A tiny config.json of every form that the hub reads, and folders of such models made without the hub's writer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fm_jax.core import tree
from fm_jax.hub import families, table
from fm_jax.hub.fields import Fields

_gpt2 = {
    "model_type": "gpt2", "vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4,
    "architectures": ["GPT2LMHeadModel"],
}  # fmt: skip
_neo = {
    "model_type": "gpt_neo", "vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16, "num_layers": 4,
    "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 5,
    "architectures": ["GPTNeoForCausalLM"],
}  # fmt: skip


def _llama(kind="llama", stem="Llama", **more):
    return {
        "model_type": kind, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "architectures": [f"{stem}ForCausalLM"], **more,
    }  # fmt: skip


def _rope(kind, **more):
    return {"head_dim": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 5_000.0, **more}}


def _bert(kind="bert", stem="Bert", task="ForMaskedLM", **more):
    return {
        "model_type": kind, "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 20, "max_position_embeddings": 32, "architectures": [stem + task], **more,
    }  # fmt: skip


def _t5(kind="t5", stem="T5", **more):
    return {
        "model_type": kind, "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "is_encoder_decoder": True,
        "architectures": [f"{stem}ForConditionalGeneration"], **more,
    }  # fmt: skip


_distilbert = {
    "model_type": "distilbert", "vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20,
    "max_position_embeddings": 32, "architectures": ["DistilBertForMaskedLM"],
}  # fmt: skip
_resnet = {
    "model_type": "resnet", "depths": [2, 1], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "bottleneck",
    "architectures": ["ResNetForImageClassification"],
}  # fmt: skip
_efficientnet = {
    "model_type": "efficientnet", "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320,
    "image_size": 42, "depthwise_padding": [1, 2, 6], "num_block_repeats": [1, 1, 1, 3, 1, 1, 1], "dropout_rate": 0.2,
    "architectures": ["EfficientNetForImageClassification"],
}  # fmt: skip
_vit = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 28,
    "image_size": 8, "patch_size": 4, "architectures": ["ViTForImageClassification"],
}  # fmt: skip
_dinov2 = {
    "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "layerscale_value": 0.5, "architectures": ["Dinov2ForImageClassification"],
}  # fmt: skip
_mae = {
    **_vit, "model_type": "vit_mae", "decoder_hidden_size": 24, "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 20, "architectures": ["ViTMAEForPreTraining"],
}  # fmt: skip
_labels = {"id2label": {"0": "bad", "1": "good", "2": "so so"}, "label2id": {"bad": 0, "good": 1, "so so": 2}}
_stretched = {"factor": 4.0, "original_max_position_embeddings": 64}

FORMS = {
    "gpt2": _gpt2,
    "gpt2-erf-wide": {**_gpt2, "activation_function": "gelu", "n_inner": 24, "attn_pdrop": 0.0, "resid_pdrop": 0.25,
                      "embd_pdrop": 0.25, "layer_norm_epsilon": 1e-6},
    "gpt2-labels": {**_gpt2, "architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0, **_labels},
    "neo": _neo,
    "neo-global": {**_neo, "attention_types": [[["global"], 4]]},
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-wide-heads": _llama(head_dim=12),
    "llama-linear": _llama(**_rope("linear", factor=4.0)),
    "llama-llama3": _llama(**_rope("llama3", **_stretched, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-yarn": _llama(**_rope("yarn", **_stretched, beta_fast=8.0, beta_slow=1.0)),
    "llama-labels": _llama(architectures=["LlamaForSequenceClassification"], pad_token_id=0, **_labels),
    "mistral": _llama("mistral", "Mistral", sliding_window=5),
    "mistral-no-window": _llama("mistral", "Mistral", sliding_window=None),
    "qwen2": _llama("qwen2", "Qwen2"),
    "qwen2-windows": _llama("qwen2", "Qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4,
                            max_window_layers=1),
    "qwen3": _llama("qwen3", "Qwen3", head_dim=8, tie_word_embeddings=True),
    "gemma": _llama("gemma", "Gemma", head_dim=8, num_key_value_heads=1),
    "bert-pretraining": _bert(task="ForPreTraining"),
    "bert-words": _bert(hidden_act="relu"),
    "bert-base": _bert(task="Model"),
    "bert-labels": _bert(task="ForSequenceClassification", **_labels),
    "bert-tags": _bert(task="ForTokenClassification", **_labels),
    "bert-span": _bert(task="ForQuestionAnswering"),
    "roberta": _bert("roberta", "Roberta", max_position_embeddings=34, type_vocab_size=1, pad_token_id=1),
    "xlm-roberta-labels": _bert("xlm-roberta", "XLMRoberta", "ForSequenceClassification", max_position_embeddings=34,
                                type_vocab_size=1, pad_token_id=1, **_labels),
    "distilbert": _distilbert,
    "electra-replaced": _bert("electra", "Electra", "ForPreTraining", embedding_size=8),
    "albert": _bert("albert", "Albert", embedding_size=8),
    "t5": _t5(),
    "t5-v1.1": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _t5("mt5", "MT5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "resnet": {**_resnet, **_labels},
    "resnet-v1": {**_resnet, "downsample_in_bottleneck": True, "num_channels": 1, "architectures": ["ResNetModel"]},
    "resnet-basic": {**_resnet, "layer_type": "basic"},
    "efficientnet": {**_efficientnet, **_labels},
    "efficientnet-base": {**_efficientnet, "architectures": ["EfficientNetModel"], "dropout_rate": 0.0},
    "vit": {**_vit, **_labels},
    "vit-base": {**_vit, "image_size": [8, 12], "qkv_bias": False, "architectures": ["ViTModel"]},
    "dinov2": {**_dinov2, **_labels},
    "dinov2-gated": {**_dinov2, "use_swiglu_ffn": True, "architectures": ["Dinov2Model"]},
    "registers": {**_dinov2, "model_type": "dinov2_with_registers", "num_register_tokens": 3,
                  "architectures": ["Dinov2WithRegistersForImageClassification"], **_labels},
    "mae": _mae,
}  # fmt: skip

# one of each way of naming and storing
FEW = (
    "gpt2", "gpt2-labels", "neo", "llama", "qwen2-windows", "qwen3", "gemma", "bert-pretraining", "roberta",
    "distilbert", "albert", "t5", "resnet", "efficientnet", "vit", "dinov2-gated", "registers", "mae",
)  # fmt: skip


def build(config):
    """Return (module, family) of a config.json."""
    family, module = families.build(Fields(config, "config.json"))
    return module, family


def draw(module, seed=0, dtype="float32"):
    """Return random parameters, each leaf different from every other."""
    rng = np.random.default_rng(seed)
    shapes = tree.flatten(families.abstract(module))
    return tree.unflatten({path: jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype) for path, leaf in shapes.items()})


def tensors(module, params):
    """Return what the hub would store."""
    return dict(table.write(families.writing(module).table(module), params))


def write(folder, config, arrays, name="model.safetensors"):
    """Write a folder with the public library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make(folder, name, seed=0, dtype="float32", **changed):
    """Write a folder of a form; return (module, its parameters)."""
    module, _ = build(FORMS[name])
    params = draw(module, seed, dtype)
    write(folder, {**FORMS[name], **changed}, tensors(module, params))
    return module, params


def assert_equal(got, want):
    """Compare two trees bit by bit."""
    assert tree.flatten(got).keys() == tree.flatten(want).keys()
    jax.tree.map(np.testing.assert_array_equal, got, want)
