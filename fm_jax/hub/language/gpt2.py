"""Configs and names of GPT-2 (Radford et al. 2019) and GPT-Neo, EleutherAI's GPT with alternating local attention."""

from dataclasses import replace
from typing import Any

import flax.linen as nn

from fm_jax.core.errors import CheckpointError, shown
from fm_jax.hub.fields import Fields
from fm_jax.hub.language import heads
from fm_jax.hub.table import Entry, Table, flipped, linear, norm, same
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Config, Decoder

KINDS = {"gpt2": "GPT2", "gpt_neo": "GPTNeo"}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
example, sites = heads.example, heads.sites
_WORDS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}

_BODY = (
    same("embed/tokens", "transformer.wte.weight"),
    same("embed/positions", "transformer.wpe.weight"),
    *norm("blocks/norm_attn", "transformer.h.{}.ln_1"),
    *norm("blocks/norm_mlp", "transformer.h.{}.ln_2"),
    *norm("norm_final", "transformer.ln_f"),
)


def _conv1d(path: str, name: str) -> tuple[Entry, Entry]:
    """Return kernel and bias of GPT-2's Conv1D, which is stored as [in, out], like ours."""
    return same(f"{path}/kernel", f"{name}.weight"), same(f"{path}/bias", f"{name}.bias")


_GPT2 = (
    *_BODY,
    *(
        Entry(f"blocks/attn/{head}/{ours}", f"transformer.h.{{}}.attn.c_attn.{theirs}", part=part, parts=3)
        for part, head in enumerate("qkv")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
    *_conv1d("blocks/attn/o", "transformer.h.{}.attn.c_proj"),
    *_conv1d("blocks/mlp/up", "transformer.h.{}.mlp.c_fc"),
    *_conv1d("blocks/mlp/down", "transformer.h.{}.mlp.c_proj"),
)
_NEO = (
    *_BODY,
    *(flipped(f"blocks/attn/{head}/kernel", f"transformer.h.{{}}.attn.attention.{head}_proj.weight") for head in "qkv"),
    *linear("blocks/attn/o", "transformer.h.{}.attn.attention.out_proj"),
    *linear("blocks/mlp/up", "transformer.h.{}.mlp.c_fc"),
    *linear("blocks/mlp/down", "transformer.h.{}.mlp.c_proj"),
)


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of model_type "gpt2" or "gpt_neo" describes."""
    cfg = _gpt2(fields) if fields.kind == "gpt2" else _neo(fields)
    return heads.headed(fields, Decoder(cfg), KINDS[fields.kind])


def writes(module: nn.Module) -> bool:
    """Say whether a module is a decoder with learned positions, or a classifier on one."""
    bare = module.backbone if isinstance(module, Classifier) else module
    return isinstance(bare, Decoder) and bare.cfg.attention.rope is None


def _gpt2(fields: Fields) -> Config:
    width, count = fields.take("n_embd", int), fields.take("n_head", int)
    fields.skip("reorder_and_upcast_attn")  # scores and their softmax are always computed in float32 here
    fields.expect("n_ctx", fields.take("n_positions", int))
    fields.skip(*(f"summary_{word}" for word in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    dropout = fields.take("resid_pdrop", float, 0.1)
    fields.expect("embd_pdrop", dropout)
    attention = AttentionConfig(
        count,
        count,
        heads.split(fields, width, count),
        scale=0.0 if fields.take("scale_attn_weights", bool, True) else 1.0,
        dropout=fields.take("attn_pdrop", float, 0.1),
    )
    activation: Any = fields.choose("activation_function", ACTIVATIONS, "gelu_new")
    return Config(
        fields.take("vocab_size", int),
        fields.take("n_positions", int),
        fields.take("n_layer", int),
        width,
        attention,
        MLPConfig(fields.take("n_inner", int, 4 * width), activation),
        NormConfig("layer", fields.take("layer_norm_epsilon", float, 1e-5)),
        tied=fields.take("tie_word_embeddings", bool, True),
        scale_by_depth=fields.take("scale_attn_by_inverse_layer_idx", bool, False),
        dropout=dropout,
    )


def _neo(fields: Fields) -> Config:
    width, count = fields.take("hidden_size", int), fields.take("num_heads", int)
    layers, window = fields.take("num_layers", int), fields.take("window_size", int, 256)
    kinds = _kinds(fields, layers)
    fields.expect("attention_layers", kinds)
    fields.skip(*(f"summary_{word}" for word in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    fields.skip("classifier_dropout")
    dropout = fields.take("resid_dropout", float, 0.0)
    fields.expect("embed_dropout", dropout)
    attention = AttentionConfig(
        count,
        count,
        heads.split(fields, width, count),
        windows=tuple(window if kind == "local" else 0 for kind in kinds),
        qkv_bias=False,
        scale=1.0,
        dropout=fields.take("attention_dropout", float, 0.0),
    )
    activation: Any = fields.choose("activation_function", ACTIVATIONS, "gelu_new")
    return Config(
        fields.take("vocab_size", int),
        fields.take("max_position_embeddings", int),
        layers,
        width,
        attention,
        MLPConfig(fields.take("intermediate_size", int, 4 * width), activation),
        NormConfig("layer", fields.take("layer_norm_epsilon", float, 1e-5)),
        tied=fields.take("tie_word_embeddings", bool, True),
        dropout=dropout,
    )


def _kinds(fields: Fields, layers: int) -> list[str]:
    """Return "global" or "local" for each layer, from a list of [kinds, times].

    Raises:
        CheckpointError: `attention_types` is no such list, or not for this number of layers; it is counted first, as a
            short list can stand for billions.
    """
    pairs = fields.many("attention_types", list, [])
    good = all(list(map(type, pair)) == [list, int] and 0 <= pair[1] <= layers for pair in pairs)
    if not good or any(kind not in ("global", "local") for group, _ in pairs for kind in group):
        raise CheckpointError(f"{fields.where}: attention_types {shown(pairs)} is not a list of [kinds, times]")
    if (count := sum(len(group) * times for group, times in pairs)) != layers:
        raise CheckpointError(f"{fields.where}: attention_types {shown(pairs)} names {count} layers of {layers}")
    return [kind for group, times in pairs for _ in range(times) for kind in group]


def table(module: nn.Module) -> Table:
    """Return the table of a GPT-2's or GPT-Neo's tensor names."""
    decoder = heads.backbone(module)
    neo = not decoder.cfg.attention.qkv_bias
    names = Table(
        _NEO if neo else _GPT2,
        # the first published files, and base models today, have no "transformer." before their names
        rename=((r"((?:wte|wpe|ln_f|h\.\d+)\..*)", r"transformer.\1"),),
        skip=(r"(?:transformer\.)?h\.\d+\.attn\.(?:attention\.)?(?:bias|masked_bias)",),
        tied=(("lm_head.weight", "transformer.wte.weight"),) if decoder.cfg.tied else (),
    )
    if isinstance(module, Classifier):
        return names.under("backbone", flipped("head/kernel", "score.weight"), tied=())
    return replace(names, entries=(*names.entries, flipped("head/kernel", "lm_head.weight")))


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg = heads.backbone(module).cfg
    if not cfg.attention.qkv_bias:
        kinds = ["local" if window else "global" for window in cfg.attention.windows]
        kinds = [kinds[layer % len(kinds)] for layer in range(cfg.num_layers)]
        kind, sizes = "GPTNeo", {
            "model_type": "gpt_neo",
            "hidden_size": cfg.d_model,
            "num_heads": cfg.attention.num_heads,
            "num_layers": cfg.num_layers,
            "max_position_embeddings": cfg.max_length,
            "intermediate_size": cfg.mlp.d_ff,
            "attention_types": [[[kind], 1] for kind in kinds],
            "attention_layers": kinds,
            "window_size": max(cfg.attention.windows) or 256,
            "resid_dropout": cfg.dropout,
            "embed_dropout": cfg.dropout,
            "attention_dropout": cfg.attention.dropout,
        }  # fmt: skip
        suffix = "ForCausalLM"
    else:
        kind, suffix, sizes = "GPT2", "LMHeadModel", {
            "model_type": "gpt2",
            "n_embd": cfg.d_model,
            "n_head": cfg.attention.num_heads,
            "n_layer": cfg.num_layers,
            "n_positions": cfg.max_length,
            "n_inner": cfg.mlp.d_ff,
            "resid_pdrop": cfg.dropout,
            "embd_pdrop": cfg.dropout,
            "attn_pdrop": cfg.attention.dropout,
            "scale_attn_weights": cfg.attention.scale != 1.0,
            "scale_attn_by_inverse_layer_idx": cfg.scale_by_depth,
            # the published models that scale by depth have this too; it matters to half precision in torch alone
            "reorder_and_upcast_attn": cfg.scale_by_depth,
        }  # fmt: skip
    if isinstance(module, Classifier):
        suffix, sizes = "ForSequenceClassification", {**sizes, **heads.labels(module.num_classes)}
    return {
        **sizes,
        "architectures": [kind + suffix],
        "vocab_size": cfg.vocab_size,
        "activation_function": _WORDS.get(cfg.mlp.activation, cfg.mlp.activation),
        "layer_norm_epsilon": cfg.norm.epsilon,
        "tie_word_embeddings": cfg.tied,
    }
