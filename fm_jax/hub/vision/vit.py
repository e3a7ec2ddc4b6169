"""Configs and names of ViT (and DeiT, stored as a ViT), DINOv2 (with registers) and MAE in transformers."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError, shown
from fm_jax.hub.example import Example, Size, image
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Spec
from fm_jax.hub.language import heads
from fm_jax.hub.table import Blank, Entry, Table, linear, norm, same
from fm_jax.hub.vision import parts
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.layers.patch_embed import PatchConfig
from fm_jax.layers.tap import ENCODER
from fm_jax.models.vision import mae
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.vit import Config, ViT

KINDS = {  # model_type: stem of its class names
    "vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "vit_mae": "ViTMAE"
}  # fmt: skip
_DINO = ("dinov2", "dinov2_with_registers")
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu",
}  # fmt: skip
_WORDS = {"gelu_tanh": "gelu_new"}
_NO_DROPOUT = (0.0, 0)
_LARGEST = 1 << 16  # pixels along a side
_POSITIONS = 1 << 26  # numbers in a table of positions, which an MAE computes before its weights are read


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of one of these families describes."""
    kind = fields.kind
    if kind == "vit_mae":
        return _mae(fields)
    backbone = ViT(_dinov2(fields) if kind in _DINO else _vit(fields))
    if kind in _DINO and fields.architecture != f"{KINDS[kind]}Model":
        backbone = ViT(replace(backbone.cfg, pool="both"))  # its classifier reads [CLS] and the mean of the patches
    return parts.headed(fields, backbone, KINDS[kind])


def _vit(fields: Fields) -> Config:
    fields.skip("encoder_stride", "pooler_act", "pooler_output_size")  # settings of heads that are not read
    return _config(fields, 1e-12, 16)


def _dinov2(fields: Fields) -> Config:
    # feature maps that a detector reads, and a token used in pretraining only
    fields.skip("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states")
    fields.skip("use_mask_token")
    registers = fields.take("num_register_tokens", int, 4) if fields.kind == "dinov2_with_registers" else 0
    if fields.kind == "dinov2_with_registers" and registers < 1:
        fields.refuse(f"num_register_tokens is {registers}; it must be above 0")
    cfg = _config(fields, 1e-6, 16 if registers else 14)
    if cfg.patches.grid[0] != cfg.patches.grid[1]:
        fields.refuse(f"image_size {cfg.patches.image_size} is not square")
    scale = fields.take("layerscale_value", float, 1.0)
    if scale <= 0:
        fields.refuse(f"layerscale_value is {scale}; it must be above 0")
    return replace(
        cfg,
        patches=replace(cfg.patches, any_size=True, resizing="antialiased" if registers else "bicubic"),
        registers=registers,
        layer_scale=scale,
        drop_path=fields.take("drop_path_rate", float, 0.0),
    )


def _mae(fields: Fields) -> nn.Module:
    if fields.architecture not in ("", "ViTMAEForPreTraining"):
        fields.refuse(f"architectures is {fields.architecture}; supported is ViTMAEForPreTraining")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        fields.expect(name, *_NO_DROPOUT)
    cfg = mae.encoder(_config(fields, 1e-12, 16))
    if cfg.patches.grid[0] != cfg.patches.grid[1]:
        fields.refuse(f"image_size {cfg.patches.image_size} is not square")
    width, count = fields.take("decoder_hidden_size", int, 512), fields.take("decoder_num_attention_heads", int, 16)
    _check_positions(fields, cfg.patches, width)
    heads_of = replace(cfg.attention, num_heads=count, num_kv_heads=count, head_dim=heads.split(fields, width, count))
    decoder = mae.Config(
        fields.take("decoder_num_hidden_layers", int, 8),
        width,
        heads_of,
        replace(cfg.mlp, d_ff=fields.take("decoder_intermediate_size", int, 2048)),
        fields.take("mask_ratio", float, 0.75),
        fields.take("norm_pix_loss", bool, False),
    )
    return mae.MAE(decoder, ViT(cfg))


def _config(fields: Fields, epsilon: float, patch_size: int) -> Config:
    width, count = fields.take("hidden_size", int, 768), fields.take("num_attention_heads", int, 12)
    size, patch = _size(fields, "image_size", 224), _square(fields, patch_size)
    channels = fields.take("num_channels", int, 3)
    parts.check_image(fields, *size, channels)
    patches = PatchConfig(size, patch, channels)
    _check_positions(fields, patches, width)
    return Config(
        patches,
        fields.take("num_hidden_layers", int, 12),
        width,
        AttentionConfig(
            count,
            count,
            heads.split(fields, width, count),
            causal=False,
            qkv_bias=fields.take("qkv_bias", bool, True),
            dropout=fields.take("attention_probs_dropout_prob", float, 0.0),
        ),
        _mlp(fields, width),
        NormConfig("layer", fields.take("layer_norm_eps", float, epsilon)),
        dropout=fields.take("hidden_dropout_prob", float, 0.0),
    )


def _check_positions(fields: Fields, patches: PatchConfig, width: int) -> None:
    if patches.rows * width > _POSITIONS:
        raise CheckpointError(f"{fields.where}: a table of {patches.rows:,} positions of width {width:,} is too large")


def _mlp(fields: Fields, width: int) -> MLPConfig:
    activation: Any = fields.choose("hidden_act", ACTIVATIONS, "gelu")
    if fields.kind not in _DINO:
        return MLPConfig(fields.take("intermediate_size", int, 4 * width), activation)
    wide = width * fields.take("mlp_ratio", int, 4)
    if fields.take("use_swiglu_ffn", bool, False):
        return MLPConfig(_gated(wide), "silu", gated=True)
    return MLPConfig(wide, activation)


def _gated(wide: int) -> int:
    """Return the width of a gated layer that costs as much as a plain one: 2/3, rounded up to a multiple of 8."""
    return (wide * 2 // 3 + 7) // 8 * 8


def _size(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """Return (height, width) from a field that is one number or a list of two.

    Raises:
        CheckpointError: the field is neither, or a size is out of range.
    """
    pair = isinstance(fields.data.get(name), list)
    value = fields.take(name, list) if pair else [fields.take(name, int, default)] * 2
    if len(value) != 2 or any(type(side) is not int or not 0 < side < _LARGEST for side in value):
        raise CheckpointError(f"{fields.where}: {name} {shown(value)} is not the size of an image")
    return value[0], value[1]


def _square(fields: Fields, default: int) -> int:
    height, width = _size(fields, "patch_size", default)
    if height != width:
        raise CheckpointError(
            f"{fields.where}: patch_size {height} × {width} is not supported, only square patches are"
        )
    return height


def table(module: nn.Module) -> Table:
    """Return the table of a module's tensor names."""
    kind = _kind(module)
    prefix, cfg = kind if kind in _DINO else "vit", _backbone(module).cfg
    gated, mask = cfg.mlp.gated, f"{prefix}.embeddings.mask_token"  # for pretraining only; with registers always stored
    names = Table(
        (*_body(prefix), *_layers("blocks", f"{prefix}.encoder.layer.{{}}", kind, gated=gated)),
        rename=((r"((?:embeddings|encoder|layernorm)\..*)", rf"{prefix}.\1"),),  # base models have no prefix
        skip=(rf"(?:{prefix}\.)?pooler\..*", rf"(?:{prefix}\.)?embeddings\.mask_token"),
        blank=(Blank(f"{prefix}.embeddings.register_tokens", mask, Spec("", (1, cfg.d_model))),),
    )
    if isinstance(module, ImageClassifier):
        return names.under("backbone", *linear("head", "classifier"))
    if not isinstance(module, mae.MAE):
        return names
    decoder = (
        *linear("decoder/embed/project", "decoder.decoder_embed"),
        Entry("decoder/embed/mask", "decoder.mask_token", singles=2),
        Entry("decoder/embed/positions", "decoder.decoder_pos_embed", singles=1),
        *_layers("decoder/blocks", "decoder.decoder_layers.{}", kind),
        *norm("decoder/norm_final", "decoder.decoder_norm"),
        *linear("decoder/head", "decoder.decoder_pred"),
    )
    # transformers 5 renamed the decoder's layers of the published files, and reads both names
    rename = (r"decoder\.decoder_encoder\.layer\.(.*)", r"decoder.decoder_layers.\1")
    return names.under("backbone", *decoder, rename=(rename, *names.rename))


def _body(prefix: str) -> tuple[Entry, ...]:
    embeddings = f"{prefix}.embeddings"
    return (
        Entry("embed/cls", f"{embeddings}.cls_token", singles=2),
        Entry("embed/registers", f"{embeddings}.register_tokens", singles=1),
        Entry("embed/positions", f"{embeddings}.position_embeddings", singles=1),
        *parts.convolution("embed", f"{embeddings}.patch_embeddings.projection", bias=True),
        *norm("norm_final", f"{prefix}.layernorm"),
    )


def _layers(path: str, name: str, kind: str, *, gated: bool = False) -> tuple[Entry, ...]:
    dino = kind in _DINO
    before, after = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    up, down = ("mlp.fc1", "mlp.fc2") if dino else ("intermediate.dense", "output.dense")
    feed: tuple[Entry, ...] = (*linear(f"{path}/mlp/up", f"{name}.{up}"), *linear(f"{path}/mlp/down", f"{name}.{down}"))
    if gated:  # one fused matrix: the rows of the gate, then those of up
        halves = enumerate(("gate", "up"))
        feed = tuple(
            replace(entry, part=part, parts=2)
            for part, half in halves
            for entry in linear(f"{path}/mlp/{half}", f"{name}.mlp.weights_in")
        ) + linear(f"{path}/mlp/down", f"{name}.mlp.weights_out")
    return (
        *norm(f"{path}/norm_attn", f"{name}.{before}"),
        *(
            entry
            for head in ("query", "key", "value")
            for entry in linear(f"{path}/attn/{head[0]}", f"{name}.attention.attention.{head}")
        ),
        *linear(f"{path}/attn/o", f"{name}.attention.output.dense"),
        *norm(f"{path}/norm_mlp", f"{name}.{after}"),
        *feed,
        same(f"{path}/scale_attn", f"{name}.layer_scale1.lambda1"),
        same(f"{path}/scale_mlp", f"{name}.layer_scale2.lambda1"),
    )


def writes(module: nn.Module) -> bool:
    """Say whether a module is a ViT, a classifier on one, or an MAE."""
    return isinstance(module, mae.MAE) or parts.is_on(module, ViT)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of the module; for an MAE also the noise that decides which patches are visible."""
    cut = _backbone(module).cfg.patches
    inputs = {"image": image(rng, size, *cut.image_size, cut.channels)}
    if isinstance(module, mae.MAE):
        inputs["noise"] = rng.random((size.rows, cut.grid[0] * cut.grid[1])).astype(np.float32)
    return Example(inputs)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare; only a model without a head returns its final hidden state."""
    names = {"embed": "embed", "layer": "block.resid_post"}
    if isinstance(module, mae.MAE):
        return {f"encoder {name}": ENCODER + site for name, site in names.items()} | names
    return names if isinstance(module, ImageClassifier) else names | {"final": "final"}


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    kind, cfg = _kind(module), _backbone(module).cfg
    height, width = cfg.patches.image_size
    shared = {
        "model_type": kind,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.attention.num_heads,
        "hidden_act": _WORDS.get(cfg.mlp.activation, cfg.mlp.activation),
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.attention.dropout,
        "layer_norm_eps": cfg.norm.epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": cfg.patches.patch_size,
        "num_channels": cfg.patches.channels,
        "qkv_bias": cfg.attention.qkv_bias,
    }
    if isinstance(module, mae.MAE):
        decoder = module.cfg
        return shared | {
            "architectures": ["ViTMAEForPreTraining"],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "intermediate_size": cfg.mlp.d_ff,
            "decoder_hidden_size": decoder.d_model,
            "decoder_num_hidden_layers": decoder.num_layers,
            "decoder_num_attention_heads": decoder.attention.num_heads,
            "decoder_intermediate_size": decoder.mlp.d_ff,
            "mask_ratio": decoder.mask_ratio,
            "norm_pix_loss": decoder.standardise,
        }
    shared |= parts.architecture(module, KINDS[kind])
    if kind == "vit":
        return shared | {"intermediate_size": cfg.mlp.d_ff}
    own = {"num_register_tokens": cfg.registers} if cfg.registers else {"use_mask_token": False}
    return shared | {
        "mlp_ratio": round(cfg.mlp.d_ff * (1.5 if cfg.mlp.gated else 1) / cfg.d_model),
        "use_swiglu_ffn": cfg.mlp.gated,
        "layerscale_value": cfg.layer_scale,
        "drop_path_rate": cfg.drop_path,
        **own,
    }


def _backbone(module: nn.Module) -> ViT:
    vit = module.backbone if isinstance(module, ImageClassifier | mae.MAE) else module
    if not isinstance(vit, ViT):
        raise CheckpointError(f"a {type(vit).__name__} is not a ViT, so this family has no names for it")
    return vit


def _kind(module: nn.Module) -> str:
    """Return the model_type of a module."""
    backbone = _backbone(module)
    if isinstance(module, mae.MAE):
        return "vit_mae"
    if backbone.cfg.registers:
        return "dinov2_with_registers"
    return "dinov2" if backbone.cfg.layer_scale else "vit"
