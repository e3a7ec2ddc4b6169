"""Configs and names of T5, T5 v1.1 (Raffel et al. 2020) and mT5 (Xue et al. 2021).

The config.json does not say reliably whether the head is tied to the token embedding: transformers 5 writes
`tie_word_embeddings: true` beside a head that differs from it, and reads that head if the file has one. `settle` does
the same. `scale_decoder_outputs` (before transformers 5: `tie_word_embeddings`) says whether the input of the head is
divided by sqrt(d_model); mT5 never divides.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.example import Example, Size, ids, text
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Weights
from fm_jax.hub.table import Entry, Table, flipped, same
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.layers.tap import ENCODER
from fm_jax.models.language.encoder_decoder import Config, EncoderDecoder, with_dropout
from fm_jax.ops.positions import Buckets

KINDS = {"t5": "T5", "mt5": "MT5"}
# their name -> (our activation, gated, their name of the activation alone); "gated-gelu" always is the tanh form
_FEEDS = {
    "relu": ("relu", False, "relu"),
    "gelu": ("gelu", False, "gelu"),
    "silu": ("silu", False, "silu"),
    "gelu_new": ("gelu_tanh", False, "gelu_new"),
    "gated-gelu": ("gelu_tanh", True, "gelu_new"),
    "gated-relu": ("relu", True, "relu"),
    "gated-silu": ("silu", True, "silu"),
}
_FARTHEST = 1 << 16  # tokens; a table of all distances is computed before the weights are read
_LENGTH = 512  # most tokens to generate, if the config has no `n_positions`


def _stack(ours: str, *parts: tuple[str, str]) -> tuple[Entry, ...]:
    """Return the names of the encoder or decoder; `parts` are (our name of a sublayer, theirs), in their order."""
    entries = [
        same(f"{ours}/bias/table", f"{ours}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        same(f"{ours}/norm_final/scale", f"{ours}.final_layer_norm.weight"),
    ]
    for number, (half, theirs) in enumerate(parts):
        layer, names = f"{ours}.block.{{}}.layer.{number}", "qkvo"
        entries.append(same(f"{ours}/blocks/norm_{half}/scale", f"{layer}.layer_norm.weight"))
        if half != "mlp":
            entries += [flipped(f"{ours}/blocks/{half}/{h}/kernel", f"{layer}.{theirs}.{h}.weight") for h in names]
            continue
        words = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        entries += [flipped(f"{ours}/blocks/mlp/{h}/kernel", f"{layer}.{theirs}.{w}.weight") for h, w in words.items()]
    return tuple(entries)


_GATED = (
    same("embed/tokens", "shared.weight"),
    *_stack("encoder", ("attn", "SelfAttention"), ("mlp", "DenseReluDense")),
    *_stack("decoder", ("attn", "SelfAttention"), ("cross", "EncDecAttention"), ("mlp", "DenseReluDense")),
    flipped("head/kernel", "lm_head.weight"),
)
_PLAIN = tuple(replace(entry, name=entry.name.replace(".wi_1.", ".wi.")) for entry in _GATED)


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of model_type "t5" or "mt5" describes."""
    kind = KINDS[fields.kind]
    if fields.architecture not in ("", f"{kind}ForConditionalGeneration", f"{kind}WithLMHeadModel"):
        fields.refuse(f"architectures is {fields.architecture}; supported is {kind}ForConditionalGeneration")
    for name, value in {"is_encoder_decoder": True, "is_decoder": False, "tie_encoder_decoder": False}.items():
        fields.expect(name, value)
    fields.skip("classifier_dropout")
    default = {"t5": "relu", "mt5": "gated-gelu"}[fields.kind]
    activation, gated, word = fields.choose("feed_forward_proj", _FEEDS, default)
    fields.expect("dense_act_fn", word)
    fields.expect("is_gated_act", gated)
    count, layers = fields.take("num_heads", int), fields.take("num_layers", int)
    tied = fields.take("tie_word_embeddings", bool, True)
    scaled = fields.take("scale_decoder_outputs", bool, tied)
    attention = AttentionConfig(count, count, fields.take("d_kv", int), qkv_bias=False, out_bias=False, scale=1.0)
    feed: Any = {"activation": activation, "gated": gated, "bias": False}
    cfg = Config(
        fields.take("vocab_size", int),
        fields.take("n_positions", int, _LENGTH),
        layers,
        fields.take("num_decoder_layers", int, layers),
        fields.take("d_model", int),
        attention,
        MLPConfig(fields.take("d_ff", int), **feed),
        NormConfig("rms", fields.take("layer_norm_epsilon", float, 1e-6)),
        Buckets(
            fields.take("relative_attention_num_buckets", int, 32, most=_FARTHEST),
            fields.take("relative_attention_max_distance", int, 128, most=_FARTHEST),
        ),
        tied=tied,
        scale_head=scaled and fields.kind == "t5",
    )
    return EncoderDecoder(with_dropout(cfg, fields.take("dropout_rate", float, 0.1)))


def settle(module: nn.Module, weights: Weights) -> nn.Module:
    """Return the module with an untied head if the file holds one, whatever the config says."""
    head, table = "lm_head.weight", "shared.weight"
    if not _model(module).cfg.tied or head not in weights.specs or table not in weights.specs:
        return module
    everything = (slice(None), slice(None))
    if weights.specs[head].shape == weights.specs[table].shape and np.array_equal(
        weights.read(head, everything), weights.read(table, everything)
    ):
        return module
    return module.clone(cfg=replace(_model(module).cfg, tied=False))


def table(module: nn.Module) -> Table:
    """Return the table of a T5's tensor names."""
    cfg = _model(module).cfg
    copies = [(f"{side}.embed_tokens.weight", "shared.weight") for side in ("encoder", "decoder")]
    if cfg.tied:
        copies.append(("lm_head.weight", "shared.weight"))
    return Table(
        _GATED if cfg.mlp.gated else _PLAIN,
        # a table in the first published files that no layer reads
        skip=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        tied=tuple(copies),
    )


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg = _model(module).cfg
    words = {(activation, gated): word for word, (activation, gated, _) in _FEEDS.items()}
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_length,
        "d_model": cfg.d_model,
        "d_kv": cfg.attention.head_dim,
        "d_ff": cfg.mlp.d_ff,
        "num_layers": cfg.num_encoder_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "num_heads": cfg.attention.num_heads,
        "relative_attention_num_buckets": cfg.buckets.count,
        "relative_attention_max_distance": cfg.buckets.max_distance,
        "feed_forward_proj": words.get((cfg.mlp.activation, cfg.mlp.gated), cfg.mlp.activation),
        "layer_norm_epsilon": cfg.norm.epsilon,
        "dropout_rate": cfg.dropout,
        "tie_word_embeddings": cfg.tied,
        "scale_decoder_outputs": cfg.scale_head,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def writes(module: nn.Module) -> bool:
    """Say whether a module is an encoder-decoder."""
    return isinstance(module, EncoderDecoder)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of an encoder-decoder; only the source is padded."""
    cfg = _model(module).cfg
    source, length, inside = text(cfg, rng, size)
    tokens = ids(cfg, rng, source.shape, size.pad)
    return Example({"tokens": tokens, "source": source, "source_length": length}, inside)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare; "layer" stands for every layer's output."""
    _model(module)
    names = {"embed": "embed", "layer": "block.resid_post", "final": "final"}
    return {f"encoder {name}": ENCODER + site for name, site in names.items()} | names


def _model(module: nn.Module) -> EncoderDecoder:
    if not isinstance(module, EncoderDecoder):
        raise CheckpointError(
            f"a {type(module).__name__} is not an encoder-decoder, so this family has no names for it"
        )
    return module
