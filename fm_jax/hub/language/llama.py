"""Configs and names of LLaMA 1 to 3, Mistral, Qwen 2, 2.5 and 3, and Gemma; the names are the same for all."""

from dataclasses import replace
from typing import Any

import flax.linen as nn

from fm_jax.core import types
from fm_jax.core.errors import CheckpointError
from fm_jax.hub.fields import Fields
from fm_jax.hub.language import heads
from fm_jax.hub.table import Table, flipped, linear, same
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Config, Decoder
from fm_jax.ops.positions import Rope

KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}
# default of rope_theta, if a config.json has none
_BASES = {"llama": 10_000.0, "mistral": 10_000.0, "qwen2": 10_000.0, "qwen3": 10_000.0, "gemma": 10_000.0}
# rotations below which a frequency is scaled fully, and above which it is not; () if the config must have the field
_TURNS: dict[str, dict[str, tuple[float, ...]]] = {
    "llama3": {"low_freq_factor": (), "high_freq_factor": ()},
    "yarn": {"beta_slow": (1.0,), "beta_fast": (32.0,)},
}
example, sites = heads.example, heads.sites
_GELUS = {
    "gelu": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # Gemma was trained with the tanh form, whatever its config says

_ENTRIES = (
    same("embed/tokens", "model.embed_tokens.weight"),
    same("blocks/norm_attn/scale", "model.layers.{}.input_layernorm.weight"),
    *(e for h in "qkvo" for e in linear(f"blocks/attn/{h}", f"model.layers.{{}}.self_attn.{h}_proj")),
    same("blocks/attn/norm_q/scale", "model.layers.{}.self_attn.q_norm.weight"),
    same("blocks/attn/norm_k/scale", "model.layers.{}.self_attn.k_norm.weight"),
    same("blocks/norm_mlp/scale", "model.layers.{}.post_attention_layernorm.weight"),
    *(flipped(f"blocks/mlp/{h}/kernel", f"model.layers.{{}}.mlp.{h}_proj.weight") for h in ("gate", "up", "down")),
    same("norm_final/scale", "model.norm.weight"),
)


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of one of these families describes."""
    kind = fields.kind
    width, count = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    head_dim = fields.take("head_dim", int) if fields.has("head_dim") else heads.split(fields, width, count)
    fields.skip("head_dim")
    biased = kind == "qwen2"
    fields.expect("attention_bias", biased)
    fields.expect("mlp_bias", False)
    attention = AttentionConfig(
        count,
        fields.take("num_key_value_heads", int, count),
        head_dim,
        rope=_rope(fields),
        windows=_windows(fields),
        qkv_bias=biased,
        out_bias=False,
        qk_norm=kind == "qwen3",
        dropout=fields.take("attention_dropout", float, 0.0),
    )
    activation: Any = "silu"
    if kind == "gemma":
        fields.choose("hidden_act", _GELUS, "gelu_pytorch_tanh")
        activation = fields.choose("hidden_activation", _GELUS, "gelu_pytorch_tanh")
    else:
        fields.expect("hidden_act", "silu")
    cfg = Config(
        fields.take("vocab_size", int),
        fields.take("max_position_embeddings", int),
        fields.take("num_hidden_layers", int),
        width,
        attention,
        MLPConfig(fields.take("intermediate_size", int), activation, gated=True, bias=False),
        NormConfig("rms", fields.take("rms_norm_eps", float, 1e-6), offset=1.0 if kind == "gemma" else 0.0),
        tied=fields.take("tie_word_embeddings", bool, kind == "gemma"),
        scale_embedding=kind == "gemma",
    )
    return heads.headed(fields, Decoder(cfg), KINDS[kind])


def writes(module: nn.Module) -> bool:
    """Say whether a module is a decoder with rotary positions, or a classifier on one."""
    bare = types.backbone(module)
    return isinstance(bare, Decoder) and bare.cfg.attention.rope is not None


def _windows(fields: Fields) -> tuple[int, ...]:
    """Return the attention window of each layer: Mistral's in all, Qwen's from layer `max_window_layers` on."""
    layers = fields.take("num_hidden_layers", int)
    size = fields.take("sliding_window", int, 0)
    first = fields.take("max_window_layers", int, layers)
    if fields.kind == "mistral":
        return (size,)
    if fields.kind not in ("qwen2", "qwen3"):
        if size:
            fields.refuse(f"sliding_window is {size}, but {fields.kind} has no sliding window")
        return (0,)
    if not fields.take("use_sliding_window", bool, False):
        fields.expect("layer_types", ["full_attention"] * layers)
        return (0,)
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    kinds = fields.take("layer_types", list, default)
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        fields.refuse(f"layer_types {kinds} does not name sliding_attention or full_attention for {layers} layers")
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(fields: Fields) -> Rope:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    data = dict(fields.take("rope_scaling", dict, {})) | dict(fields.take("rope_parameters", dict, {}))
    theirs = Fields(data, f"{fields.where}, rope scaling")
    base = theirs.take("rope_theta", float, fields.take("rope_theta", float, _BASES[fields.kind]))
    kind = theirs.take("rope_type", str, theirs.take("type", str, "default"))
    length = fields.take("max_position_embeddings", int)
    if kind == "default":
        rope = Rope(base)
    elif kind == "linear":
        rope = Rope(base, "linear", theirs.take("factor", float))
    elif kind in ("llama3", "yarn"):
        low, high = (theirs.take(word, float, *default) for word, default in _TURNS[kind].items())
        original = theirs.take("original_max_position_embeddings", int, length)
        rope = Rope(base, "llama3" if kind == "llama3" else "yarn", theirs.take("factor", float), original, low, high)
    else:
        raise CheckpointError(
            f"{fields.where}: rope_type {kind!r} is not supported, only default, linear, llama3, yarn"
        )
    theirs.expect("partial_rotary_factor", 1.0)
    theirs.close()
    return rope


def table(module: nn.Module) -> Table:
    """Return the table of these families' tensor names."""
    tied = (("lm_head.weight", "model.embed_tokens.weight"),) if heads.backbone(module).cfg.tied else ()
    names = Table(
        _ENTRIES,
        rename=((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),),
        skip=(r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        tied=tied,
    )
    if isinstance(module, Classifier):
        return names.under("backbone", flipped("head/kernel", "score.weight"), tied=())
    return replace(names, entries=(*_ENTRIES, flipped("head/kernel", "lm_head.weight")))


def kind(cfg: Config) -> str:
    """Return the model_type that is closest to a decoder with rotary positions; "llama" if no other fits."""
    windows = any(cfg.attention.windows)
    forms = {
        "gemma": (cfg.norm.offset == 1.0, cfg.scale_embedding, cfg.mlp.activation == "gelu_tanh", not windows),
        "qwen3": (cfg.attention.qk_norm,),
        "qwen2": (cfg.attention.qkv_bias,),
        "mistral": (windows, len(set(cfg.attention.windows)) == 1),
    }
    return next((name for name, signs in forms.items() if all(signs)), "llama")


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg = heads.backbone(module).cfg
    group, model_type = cfg.attention, kind(cfg)
    data: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [
            KINDS[model_type] + ("ForSequenceClassification" if isinstance(module, Classifier) else "ForCausalLM")
        ],
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.mlp.d_ff,
        "num_attention_heads": group.num_heads,
        "num_key_value_heads": group.num_kv_heads,
        "head_dim": group.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if model_type == "gemma" else cfg.mlp.activation,
        "rms_norm_eps": cfg.norm.epsilon,
        "tie_word_embeddings": cfg.tied,
        "attention_dropout": group.dropout,
        "rope_parameters": _rope_fields(group.rope or Rope(), cfg.max_length),
    }
    if model_type != "qwen2":
        data["attention_bias"] = group.qkv_bias
    windows = [group.windows[layer % len(group.windows)] for layer in range(cfg.num_layers)]
    if model_type == "mistral":
        data["sliding_window"] = windows[0] or None
    if model_type in ("qwen2", "qwen3") and any(windows):
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        # transformers reads layer_types; the older field says the same if the upper layers have the windows
        data |= {"use_sliding_window": True, "sliding_window": max(windows), "layer_types": kinds}
        data["max_window_layers"] = kinds.index("sliding_attention")
    if isinstance(module, Classifier):
        data |= heads.labels(module.num_classes)
    return data


def _rope_fields(rope: Rope, length: int) -> dict[str, Any]:
    theirs: dict[str, Any] = {
        "rope_type": "default" if rope.scaling == "none" else rope.scaling,
        "rope_theta": rope.base,
    }
    if rope.scaling == "none":
        return theirs
    theirs["factor"] = rope.factor
    if rope.scaling == "linear":
        return theirs
    low, high = ("low_freq_factor", "high_freq_factor") if rope.scaling == "llama3" else ("beta_slow", "beta_fast")
    return {
        **theirs,
        "original_max_position_embeddings": rope.original_length,
        low: rope.low_frequency,
        high: rope.high_frequency,
    }
