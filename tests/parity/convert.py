"""transformers' decoders in our terms: their config -> ours, their named tensors (numpy) -> our stacked parameters.

A plain dict a family, our path -> (their name, transform); "{}" in a name is the layer, and such leaves are stacked.
Works on weights and on gradients alike, for every transform is a linear rearrangement.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fm_jax.core import tree
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.models.language.decoder import Config
from fm_jax.ops.positions import Rope

Entry = tuple[str, Callable[[np.ndarray], np.ndarray]]

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}


def same(w: np.ndarray) -> np.ndarray:
    return w


def flip(w: np.ndarray) -> np.ndarray:
    """Turn a torch Linear's (out, in) into (in, out)."""
    return w.T


def third(index: int) -> Callable[[np.ndarray], np.ndarray]:
    """Take q, k or v out of GPT-2's fused projection, whose Conv1D is (in, out) already."""
    return lambda w: np.split(w, 3, axis=-1)[index]


def _norms(ours: str, theirs: str) -> dict[str, Entry]:
    return {f"{ours}/scale": (f"{theirs}.weight", same), f"{ours}/bias": (f"{theirs}.bias", same)}


def _linear(ours: str, theirs: str, transform: Callable[[np.ndarray], np.ndarray]) -> dict[str, Entry]:
    return {f"{ours}/kernel": (f"{theirs}.weight", transform), f"{ours}/bias": (f"{theirs}.bias", same)}


GPT2: dict[str, Entry] = {
    "embed/tokens": ("transformer.wte.weight", same),
    "embed/positions": ("transformer.wpe.weight", same),
    **_norms("blocks/norm_attn", "transformer.h.{}.ln_1"),
    **{
        f"blocks/attn/{name}/{ours}": (f"transformer.h.{{}}.attn.c_attn.{theirs}", third(index))
        for index, name in enumerate("qkv")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **_linear("blocks/attn/o", "transformer.h.{}.attn.c_proj", same),
    **_norms("blocks/norm_mlp", "transformer.h.{}.ln_2"),
    **_linear("blocks/mlp/up", "transformer.h.{}.mlp.c_fc", same),
    **_linear("blocks/mlp/down", "transformer.h.{}.mlp.c_proj", same),
    **_norms("norm_final", "transformer.ln_f"),
}

NEO: dict[str, Entry] = {
    **{ours: entry for ours, entry in GPT2.items() if "/attn/" not in ours and "/mlp/" not in ours},
    **{f"blocks/attn/{name}/kernel": (f"transformer.h.{{}}.attn.attention.{name}_proj.weight", flip) for name in "qkv"},
    **_linear("blocks/attn/o", "transformer.h.{}.attn.attention.out_proj", flip),
    **_linear("blocks/mlp/up", "transformer.h.{}.mlp.c_fc", flip),
    **_linear("blocks/mlp/down", "transformer.h.{}.mlp.c_proj", flip),
}

LLAMA: dict[str, Entry] = {
    "embed/tokens": ("model.embed_tokens.weight", same),
    "head/kernel": ("lm_head.weight", flip),
    "norm_final/scale": ("model.norm.weight", same),
    "blocks/norm_attn/scale": ("model.layers.{}.input_layernorm.weight", same),
    "blocks/norm_mlp/scale": ("model.layers.{}.post_attention_layernorm.weight", same),
    **{
        path: entry
        for name in "qkvo"
        for path, entry in _linear(f"blocks/attn/{name}", f"model.layers.{{}}.self_attn.{name}_proj", flip).items()
    },
    "blocks/attn/norm_q/scale": ("model.layers.{}.self_attn.q_norm.weight", same),
    "blocks/attn/norm_k/scale": ("model.layers.{}.self_attn.k_norm.weight", same),
    **{
        f"blocks/mlp/{name}/kernel": (f"model.layers.{{}}.mlp.{name}_proj.weight", flip)
        for name in ("gate", "up", "down")
    },
}

TABLES = {"gpt2": GPT2, "gpt_neo": NEO, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA)}


def config(theirs: Mapping[str, Any]) -> Config:
    """Translate a transformers config, as `to_dict()` gives it."""
    kind = theirs["model_type"]
    if kind == "gpt2":
        width, heads = theirs["n_embd"], theirs["n_head"]
        attention = AttentionConfig(heads, heads, width // heads)
        mlp = MLPConfig(theirs["n_inner"] or 4 * width, ACTIVATIONS[theirs["activation_function"]])
        return Config(
            theirs["vocab_size"], theirs["n_positions"], theirs["n_layer"], width, attention, mlp,
            NormConfig("layer", theirs["layer_norm_epsilon"]),
        )  # fmt: skip
    if kind == "gpt_neo":
        width, heads = theirs["hidden_size"], theirs["num_heads"]
        windows = tuple(theirs["window_size"] if kind == "local" else 0 for kind in theirs["attention_layers"])
        attention = AttentionConfig(heads, heads, width // heads, windows=windows, qkv_bias=False, scale=1.0)
        mlp = MLPConfig(theirs["intermediate_size"] or 4 * width, ACTIVATIONS[theirs["activation_function"]])
        return Config(
            theirs["vocab_size"], theirs["max_position_embeddings"], theirs["num_layers"], width, attention, mlp,
            NormConfig("layer", theirs["layer_norm_epsilon"]),
        )  # fmt: skip
    return _llama(kind, theirs)


def _llama(kind: str, theirs: Mapping[str, Any]) -> Config:
    heads = theirs["num_attention_heads"]
    layers = theirs["num_hidden_layers"]
    windows: tuple[int, ...] = (0,)
    if theirs.get("sliding_window"):
        kinds = theirs.get("layer_types") or ["sliding_attention"] * layers
        windows = tuple(theirs["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds)
    attention = AttentionConfig(
        heads,
        theirs["num_key_value_heads"],
        theirs.get("head_dim") or theirs["hidden_size"] // heads,
        rope(theirs["rope_parameters"]),
        windows,
        qkv_bias=kind == "qwen2",
        out_bias=False,
        qk_norm=kind == "qwen3",
    )
    cfg = Config(
        theirs["vocab_size"],
        theirs["max_position_embeddings"],
        layers,
        theirs["hidden_size"],
        attention,
        MLPConfig(theirs["intermediate_size"], ACTIVATIONS[theirs["hidden_act"]], gated=True, bias=False),
        NormConfig("rms", theirs["rms_norm_eps"]),
        tied=theirs["tie_word_embeddings"],
    )
    if kind == "gemma":
        return replace(cfg, norm=replace(cfg.norm, offset=1.0), scale_embedding=True)
    return cfg


def rope(theirs: Mapping[str, Any]) -> Rope:
    """Translate transformers' `rope_parameters`."""
    kind, base = theirs["rope_type"], theirs["rope_theta"]
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(base, "linear", theirs["factor"])
    low, high = (
        (theirs["low_freq_factor"], theirs["high_freq_factor"])
        if kind == "llama3"
        else (theirs.get("beta_slow", 1.0), theirs.get("beta_fast", 32.0))
    )
    return Rope(base, kind, theirs["factor"], theirs["original_max_position_embeddings"], low, high)


def params(kind: str, tensors: Mapping[str, np.ndarray], num_layers: int) -> dict[str, Any]:
    """Rename, rearrange and stack; every tensor is used or this raises."""
    left = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    flat, used = {}, set()
    for path, (template, transform) in TABLES[kind].items():
        names = [template.format(i) for i in range(num_layers)] if "{}" in template else [template]
        if names[0] not in left:
            continue  # a bias or a head that this configuration does not have: `used` and the model's shapes decide
        parts = [transform(left[name]) for name in names]
        used |= set(names)
        flat[path] = np.ascontiguousarray(np.stack(parts) if "{}" in template else parts[0], np.float32)
    if unused := sorted(left.keys() - used):
        raise ValueError(f"tensors without a place here: {unused}")
    return tree.unflatten(flat)
