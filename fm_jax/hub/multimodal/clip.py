"""Configs and names of CLIP and SigLIP in transformers: the whole model, and each tower alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.example import Example, Size, image, text
from fm_jax.hub.fields import Fields
from fm_jax.hub.language import heads
from fm_jax.hub.table import Entry, Table, flipped, linear, norm, same
from fm_jax.hub.vision import parts
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.layers.patch_embed import PatchConfig
from fm_jax.layers.tap import IMAGE
from fm_jax.models.language import decoder
from fm_jax.models.multimodal.clip import CLIP, Config, ImageTower, Read, TextTower
from fm_jax.models.vision import vit

KINDS = {  # model_type: stem of its class names
    "clip": "CLIP", "clip_text_model": "CLIPText", "clip_vision_model": "CLIPVision",
    "siglip": "Siglip", "siglip_text_model": "SiglipText", "siglip_vision_model": "SiglipVision",
}  # fmt: skip
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "silu": "silu",
}  # fmt: skip
_WORDS = {"gelu_tanh": "gelu_pytorch_tanh"}
_LEGACY = 2  # an eos_token_id with which transformers reads a text at its largest id
_SITES = {"embed": "embed", "layer": "block.resid_post"}
_LARGEST = 1 << 16  # pixels along a side

Form = Literal["clip", "siglip"]


class _Usual(NamedTuple):
    """What the classes of a form have by default."""

    vocab_size: int
    text: tuple[int, int, int, int]  # width, width of the feed-forward layer, heads, longest text
    patch_size: int
    activation: str
    epsilon: float


_USUAL: dict[Form, _Usual] = {
    "clip": _Usual(49408, (512, 2048, 8, 77), 32, "quick_gelu", 1e-5),
    "siglip": _Usual(32000, (768, 3072, 12, 64), 16, "gelu_pytorch_tanh", 1e-6),
}


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of one of these model types describes."""
    kind = fields.kind
    form: Form = "siglip" if kind.startswith("siglip") else "clip"
    if kind == form:
        return CLIP(_whole(fields, form))
    named = KINDS[kind]
    bare, full = f"{named}Model", f"{named}ModelWithProjection"
    if fields.architecture not in ("", bare, *((full,) if form == "clip" else ())):
        known = f"{bare} and {full}" if form == "clip" else bare
        fields.refuse(f"architectures is {fields.architecture}; supported are {known}")
    projected = form == "clip" and fields.architecture != bare
    if kind.endswith("_vision_model"):
        width = _width(fields, "projection_dim", 512) if form == "clip" else 0
        return ImageTower(vit.ViT(_image(fields, form)), width if projected else 0)
    cfg, width = _text(fields, form), _text_out(fields, form)
    read, end = _read(fields, form)
    return TextTower(decoder.Decoder(cfg), width if projected or form == "siglip" else 0, read, end, form == "siglip")


def _whole(fields: Fields, form: Form) -> Config:
    if fields.architecture not in ("", f"{KINDS[form]}Model"):
        fields.refuse(f"architectures is {fields.architecture}; supported is {KINDS[form]}Model")
    inner_text, inner_image = _inside(fields, "text_config"), _inside(fields, "vision_config")
    text_cfg, image_cfg = _text(inner_text, form), _image(inner_image, form)
    width = _text_out(inner_text, form)
    if form == "clip":
        inner_image.skip("projection_dim")  # of the towers alone
        width = _width(fields, "projection_dim", 512)
    elif width != image_cfg.d_model:
        fields.refuse(f"projection_size {width} of the text is not the width {image_cfg.d_model} of the image")
        width = image_cfg.d_model
    read, end = _read(inner_text, form)
    cfg = Config(image_cfg, text_cfg, width, form, read, end)
    if form == "siglip":
        return cfg
    return replace(cfg, start_scale=fields.take("logit_scale_init_value", float, 2.6592))


def _inside(fields: Fields, name: str) -> Fields:
    """Return a tower's config. Old files have it twice: as in transformers, the one with "_dict" then counts alone."""
    older = fields.take(f"{name}_dict", dict, {})
    stated = fields.take(name, dict, {})
    return fields.inside(name, older or stated)


def _text(fields: Fields, form: Form) -> decoder.Config:
    usual = _USUAL[form]
    width, wide, count, longest = usual.text
    width, count = fields.take("hidden_size", int, width), fields.take("num_attention_heads", int, count)
    return decoder.Config(
        fields.take("vocab_size", int, usual.vocab_size),
        fields.take("max_position_embeddings", int, longest),
        fields.take("num_hidden_layers", int, 12),
        width,
        _attention(fields, width, count, causal=form == "clip"),
        _mlp(fields, form, wide),
        NormConfig("layer", fields.take("layer_norm_eps", float, usual.epsilon)),
    )


def _text_out(fields: Fields, form: Form) -> int:
    if form == "clip":
        return _width(fields, "projection_dim", 512)
    return _width(fields, "projection_size", fields.take("hidden_size", int, _USUAL[form].text[0]))


def _width(fields: Fields, name: str, default: int) -> int:
    """Return the width of a projection.

    Raises:
        CheckpointError: it is below 1.
    """
    width = fields.take(name, int, default)
    if width < 1:
        raise CheckpointError(f"{fields.where}: {name} is {width}; it must be at least 1")
    return width


def _read(fields: Fields, form: Form) -> tuple[Read, int]:
    """Return where a text is read, and its end token."""
    if form == "siglip":
        return "last", 0
    end = fields.take("eos_token_id", int, 49407)
    if end < 0:
        fields.refuse(f"eos_token_id is {end}: a text is read at that token")
    return ("largest", 0) if end == _LEGACY else ("end", end)


def _image(fields: Fields, form: Form) -> vit.Config:
    usual = _USUAL[form]
    width, count = fields.take("hidden_size", int, 768), fields.take("num_attention_heads", int, 12)
    size, patch = _side(fields, "image_size", 224), _side(fields, "patch_size", usual.patch_size)
    channels = fields.take("num_channels", int, 3)
    parts.check_image(fields, size, size, channels)
    if form == "siglip":
        fields.expect("vision_use_head", True)
    return vit.Config(
        PatchConfig((size, size), patch, channels, cls=form == "clip", bias=form == "siglip"),
        fields.take("num_hidden_layers", int, 12),
        width,
        _attention(fields, width, count, causal=False),
        _mlp(fields, form, 3072),
        NormConfig("layer", fields.take("layer_norm_eps", float, usual.epsilon)),
        pool="cls" if form == "clip" else "attention",
        norm_embed=form == "clip",
    )


def _side(fields: Fields, name: str, default: int) -> int:
    """Return a field that is one number of pixels.

    Raises:
        CheckpointError: it is out of range.
    """
    side = fields.take(name, int, default)
    if not 0 < side < _LARGEST:
        raise CheckpointError(f"{fields.where}: {name} {side} is not a number of pixels")
    return side


def _attention(fields: Fields, width: int, count: int, *, causal: bool) -> AttentionConfig:
    rate = fields.take("attention_dropout", float, 0.0)
    return AttentionConfig(count, count, heads.split(fields, width, count), causal=causal, dropout=rate)


def _mlp(fields: Fields, form: Form, wide: int) -> MLPConfig:
    activation: Any = fields.choose("hidden_act", _ACTIVATIONS, _USUAL[form].activation)
    fields.expect("dropout", 0.0)  # of files older than the class without it
    return MLPConfig(fields.take("intermediate_size", int, wide), activation)


def table(module: nn.Module) -> Table:
    """Return the table of a module's tensor names."""
    form = _form(module)
    skip = (r".*\.position_ids",)
    if isinstance(module, ImageTower):
        return Table(_image_entries(form), rename=(_prefixed("vision_model"),), skip=skip)
    if isinstance(module, TextTower):
        return Table(_text_entries(form), rename=(_prefixed("text_model"),), skip=skip)
    single = 1 if form == "siglip" else 0
    numbers = tuple(Entry(ours, f"logit_{ours}", singles=single) for ours in ("scale", "bias"))
    both = (Table(_text_entries(form)).under("text"), Table(_image_entries(form)).under("image"))
    return Table((*numbers, *both[0].entries, *both[1].entries), skip=skip)


def _prefixed(prefix: str) -> tuple[str, str]:
    """Return the renaming of a tower's files without prefix."""
    first = "embeddings|encoder|final_layer_norm|head|pre_layrnorm|post_layernorm"
    return rf"((?:{first})\..*)", rf"{prefix}.\1"


def _text_entries(form: Form) -> tuple[Entry, ...]:
    name = "text_model"
    projection = (flipped("project/kernel", "text_projection.weight"),)
    out = linear("project", f"{name}.head") if form == "siglip" else projection
    return (
        same("backbone/embed/tokens", f"{name}.embeddings.token_embedding.weight"),
        same("backbone/embed/positions", f"{name}.embeddings.position_embedding.weight"),
        *_layers("backbone/blocks", f"{name}.encoder.layers.{{}}"),
        *norm("backbone/norm_final", f"{name}.final_layer_norm"),
        *out,
    )


def _image_entries(form: Form) -> tuple[Entry, ...]:
    name = "vision_model"
    return (
        same("backbone/embed/cls", f"{name}.embeddings.class_embedding"),
        same("backbone/embed/positions", f"{name}.embeddings.position_embedding.weight"),
        *parts.convolution("backbone/embed", f"{name}.embeddings.patch_embedding", bias=form == "siglip"),
        *norm("backbone/norm_embed", f"{name}.pre_layrnorm"),  # their spelling
        *_layers("backbone/blocks", f"{name}.encoder.layers.{{}}"),
        *norm("backbone/norm_final", f"{name}.post_layernorm"),
        *(_pool("backbone/head", f"{name}.head") if form == "siglip" else ()),
        flipped("project/kernel", "visual_projection.weight"),
    )


def _layers(path: str, name: str) -> tuple[Entry, ...]:
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return (
        *norm(f"{path}/norm_attn", f"{name}.layer_norm1"),
        *(
            entry
            for ours, theirs in projections.items()
            for entry in linear(f"{path}/attn/{ours}", f"{name}.self_attn.{theirs}")
        ),
        *norm(f"{path}/norm_mlp", f"{name}.layer_norm2"),
        *linear(f"{path}/mlp/up", f"{name}.mlp.fc1"),
        *linear(f"{path}/mlp/down", f"{name}.mlp.fc2"),
    )


def _pool(path: str, name: str) -> tuple[Entry, ...]:
    """Return the entries of a learned query's attention, whose three projections are stored as one."""
    return (
        Entry(f"{path}/probe", f"{name}.probe", singles=2),
        *(
            entry
            for part, head in enumerate("qkv")
            for entry in (
                Entry(f"{path}/attn/{head}/kernel", f"{name}.attention.in_proj_weight", (1, 0), part, 3),
                Entry(f"{path}/attn/{head}/bias", f"{name}.attention.in_proj_bias", part=part, parts=3),
            )
        ),
        *linear(f"{path}/attn/o", f"{name}.attention.out_proj"),
        *norm(f"{path}/norm", f"{name}.layernorm"),
        *linear(f"{path}/mlp/up", f"{name}.mlp.fc1"),
        *linear(f"{path}/mlp/down", f"{name}.mlp.fc2"),
    )


def writes(module: nn.Module) -> bool:
    """Say whether a module is a CLIP or SigLIP, or one of their towers."""
    return isinstance(module, CLIP | ImageTower | TextTower)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of the module; the last real token of each text is its end token."""
    inputs, inside = dict[str, np.ndarray](), None
    if isinstance(module, CLIP | ImageTower):
        cut = _image_config(module).patches
        inputs["image"] = image(rng, size, *cut.image_size, cut.channels)
    if isinstance(module, CLIP | TextTower):
        tokens, length, inside = text(_text_config(module), rng, size)
        read, end = _reading(module)
        if read == "end" and end != size.pad:
            tokens[np.arange(len(tokens)), length - 1] = end
        inputs["tokens"] = tokens
    return Example(inputs, inside)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare; of a whole model the image tower's are named so."""
    if not isinstance(module, CLIP):
        return dict(_SITES)
    return {f"image {name}": IMAGE + site for name, site in _SITES.items()} | _SITES


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    form = _form(module)
    if isinstance(module, CLIP):
        cfg = module.cfg
        whole: dict[str, Any] = {
            "model_type": form,
            "architectures": [f"{KINDS[form]}Model"],
            "text_config": _text_fields(cfg.text, form, cfg.width, cfg.read, cfg.end_id),
            "vision_config": _image_fields(cfg.image, form, cfg.width),
        }
        if form == "clip":
            whole |= {"projection_dim": cfg.width, "logit_scale_init_value": cfg.start_scale}
        return whole
    if isinstance(module, TextTower):
        own = _text_fields(module.backbone.cfg, form, module.out, module.read, module.end_id)
    else:
        own = _image_fields(_image_config(module), form, _out(module))
    if form == "clip" and not _out(module):
        own.pop("projection_dim")
    with_projection = "WithProjection" if form == "clip" and _out(module) else ""
    return own | {"architectures": [f"{KINDS[own['model_type']]}Model{with_projection}"]}


def _text_fields(cfg: decoder.Config, form: Form, width: int, read: Read, end: int) -> dict[str, Any]:
    shared = {
        "model_type": f"{form}_text_model",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        **_shared_fields(cfg),
    }
    if form == "siglip":
        return shared | {"projection_size": width}
    return shared | {"projection_dim": width, "eos_token_id": _LEGACY if read == "largest" else end}


def _image_fields(cfg: vit.Config, form: Form, width: int) -> dict[str, Any]:
    shared = {
        "model_type": f"{form}_vision_model",
        "image_size": cfg.patches.image_size[0],
        "patch_size": cfg.patches.patch_size,
        "num_channels": cfg.patches.channels,
        **_shared_fields(cfg),
    }
    return shared | ({"projection_dim": width} if form == "clip" else {"vision_use_head": True})


def _shared_fields(cfg: vit.Config | decoder.Config) -> Mapping[str, Any]:
    return {
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.mlp.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.attention.num_heads,
        "hidden_act": _WORDS.get(cfg.mlp.activation, cfg.mlp.activation),
        "attention_dropout": cfg.attention.dropout,
        "layer_norm_eps": cfg.norm.epsilon,
    }


def _form(module: nn.Module) -> Form:
    """Return the form of a module: a tower's follows from what only SigLIP's has.

    Raises:
        CheckpointError: another module, or a tower on another backbone.
    """
    if isinstance(module, CLIP):
        return module.cfg.form
    if isinstance(module, TextTower):
        return "siglip" if module.bias else "clip"
    return "siglip" if _image_config(module).pool == "attention" else "clip"


def _image_config(module: nn.Module) -> vit.Config:
    if isinstance(module, CLIP):
        return module.cfg.image
    if isinstance(module, ImageTower) and isinstance(module.backbone, vit.ViT):
        return module.backbone.cfg
    raise CheckpointError(f"a {type(module).__name__} has no image tower that transformers knows")


def _text_config(module: CLIP | TextTower) -> decoder.Config:
    return module.cfg.text if isinstance(module, CLIP) else module.backbone.cfg


def _reading(module: CLIP | TextTower) -> tuple[Read, int]:
    return (module.cfg.read, module.cfg.end_id) if isinstance(module, CLIP) else (module.read, module.end_id)


def _out(module: nn.Module) -> int:
    return module.out if isinstance(module, ImageTower | TextTower) else 0
