"""CLIP and SigLIP: a tiny config.json of every form, and what live torch is compared on."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.layers.tap import IMAGE, Tap
from fm_jax.models.multimodal.clip import CLIP, ImageTower, TextTower
from fm_jax.objectives import image_text
from tests.parity import torch_models
from tests.parity.changes import edit, swap, turned

_text = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 10,
}  # fmt: skip
_image = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_clip = {
    "model_type": "clip", "text_config": {**_text, "eos_token_id": 39}, "vision_config": _image, "projection_dim": 12,
    "architectures": ["CLIPModel"],
}  # fmt: skip
_siglip = {
    "model_type": "siglip", "text_config": {**_text, "projection_size": 24}, "vision_config": _image,
    "architectures": ["SiglipModel"],
}  # fmt: skip

FORMS = {
    "clip": _clip,
    "clip-largest": {**_clip, "text_config": {**_text, "eos_token_id": 2}},
    "clip-text": {"model_type": "clip_text_model", **_text, "projection_dim": 12, "eos_token_id": 39,
                  "architectures": ["CLIPTextModelWithProjection"]},
    "clip-text-bare": {"model_type": "clip_text_model", **_text, "eos_token_id": 39,
                       "architectures": ["CLIPTextModel"]},
    "clip-image": {"model_type": "clip_vision_model", **_image, "projection_dim": 12,
                   "architectures": ["CLIPVisionModelWithProjection"]},
    "siglip": _siglip,
    "siglip-text": {"model_type": "siglip_text_model", **_text, "projection_size": 20,
                    "architectures": ["SiglipTextModel"]},
    "siglip-image": {"model_type": "siglip_vision_model", **_image, "architectures": ["SiglipVisionModel"]},
}  # fmt: skip

FEW = ("clip", "clip-text", "clip-image", "siglip")  # one of each way of naming and storing

ROWS = 4
KEPT = ("embed", "block.resid_post")
TOLERANCE = 5e-5  # of the peer's standard deviation, in float32 on CPU
INSIDES = ()  # texts are compared where they are read

# name -> (class, config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPModel", _clip),
    "clip-largest": (
        "CLIPModel",
        {**_clip, "text_config": {**_text, "eos_token_id": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
         "vision_config": {**_image, "num_channels": 1, "hidden_act": "gelu"}},
    ),
    "clip-text": ("CLIPTextModelWithProjection", FORMS["clip-text"]),
    "clip-image": ("CLIPVisionModelWithProjection", FORMS["clip-image"]),
    "siglip": ("SiglipModel", _siglip),
    "siglip-text": ("SiglipTextModel", FORMS["siglip-text"]),
    "siglip-image": ("SiglipVisionModel", FORMS["siglip-image"]),
}  # fmt: skip


def peer(case: str, *, moved: bool = True) -> Any:
    """Return the peer in evaluation mode, freshly initialised or moved."""
    import torch
    import transformers

    kind, options = CASES[case]
    options = {name: value for name, value in options.items() if name not in ("model_type", "architectures")}
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    config = cls.config_class(**options)
    config.architectures = [kind]
    config._attn_implementation = "eager"
    model = cls(config).eval()
    return torch_models.perturb(model) if moved else model


def rows(case: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return images, texts and a readout of a case; the texts end early, and one holds its end token twice."""
    rng = np.random.default_rng(1)
    image, text = config.get("vision_config", config), config.get("text_config", config)
    found: dict[str, np.ndarray] = {"readout": rng.normal(size=64).astype(np.float32)}
    if "text" not in case:
        shape = (ROWS, image["image_size"], image["image_size"], image.get("num_channels", 3))
        found["image"] = rng.normal(0.2, 1, shape).astype(np.float32)
    if "image" not in case:
        tokens = rng.integers(3, text["vocab_size"] - 1, (ROWS, text["max_position_embeddings"])).astype(np.int32)
        if not case.startswith("siglip"):  # the end token is the last id; what follows must not matter
            for row, end in enumerate((4, 9, 6, 2)):
                tokens[row, end] = text["vocab_size"] - 1
            tokens[0, 7] = text["vocab_size"] - 1
        found["tokens"] = tokens
    return found


def batch(case: str) -> dict[str, np.ndarray]:
    """Return the batch of a case."""
    return rows(case, CASES[case][1])


tensors = torch_models.tensors


def theirs(case: str, model: Any) -> dict[str, Any]:
    """Return the peer's answer: outputs, states [1 + L, B, T, D] of each tower, loss and gradients."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in batch(case).items()}
    inputs = {}
    if "image" in given:
        inputs["pixel_values"] = given["image"].permute(0, 3, 1, 2)
    if "tokens" in given:
        inputs["input_ids"] = given["tokens"].long()
    both = len(inputs) == 2
    towers = {}
    if "image" in given:
        towers["image.states" if both else "states"] = getattr(model, "vision_model", model)
    if "tokens" in given:
        towers["states"] = getattr(model, "text_model", model)
    model.zero_grad()
    with ExitStack() as stack:
        states = {
            side: stack.enter_context(torch_models.watched(tower.encoder.layers)) for side, tower in towers.items()
        }
        out = model(**inputs, return_loss=True) if both else model(**inputs)
    if both:
        outputs = {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
        loss = out.loss
    else:
        vector = getattr(out, "text_embeds" if "tokens" in given else "image_embeds", None)
        outputs = {"out": out.pooler_output if vector is None else vector}
        loss = (outputs["out"].square() @ given["readout"][: outputs["out"].shape[1]]).mean()
    loss.backward()
    return {
        "outputs": {name: array.detach().numpy() for name, array in outputs.items()},
        "states": {side: torch_models.stacked(kept) for side, kept in states.items()},
        "loss": loss.item(),
        "gradients": torch_models.gradients(model),
    }


def ours(model: Any, given: Mapping[str, np.ndarray]) -> Any:
    """Return a jitted params -> our answer."""
    inputs = tuple(jnp.asarray(given[name]) for name in ("image", "tokens") if name in given)
    sides = {"image.states": IMAGE, "states": ""} if isinstance(model, CLIP) else {"states": ""}
    tap = Tap(read=tuple(side + site for side in sides.values() for site in KEPT))
    kind = image_text.sigmoid if isinstance(model, CLIP) and model.cfg.form == "siglip" else image_text.softmax
    fields = {**given, "weights": jnp.ones(ROWS)}

    def mean(params: Any) -> jax.Array:
        if isinstance(model, CLIP):
            total, weight, *_ = kind(model.apply)(params, fields)
            return total / weight
        out = model.apply({"params": params}, *inputs)
        return (jnp.square(out) @ given["readout"][: out.shape[1]]).mean()

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        out, kept = model.apply({"params": params}, *inputs, tap=tap, mutable=["taps"])
        read = {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept["taps"])}
        states = {
            name: jnp.concatenate([read[f"site:{side}embed"][None], read[f"site:{side}block.resid_post"]])
            for name, side in sides.items()
        }
        outputs = {"out": out}
        if isinstance(model, CLIP):
            outputs = {"image": out.image, "text": out.text, "logits": image_text.logits(out)}
        loss, slopes = jax.value_and_grad(mean)(params)
        return {"outputs": outputs, "states": states, "loss": loss, "gradients": slopes}

    return compute


def tower(model: Any, name: str, **changes: Any) -> Any:
    """Change fields of a tower's config, or of one part of it: "text", "image", "text.mlp" …"""
    which, _, inner = name.partition(".")
    if isinstance(model, ImageTower | TextTower):
        cfg = model.backbone.cfg
        return model.clone(backbone=model.backbone.clone(cfg=_changed(cfg, inner, changes)))
    return model.clone(cfg=replace(model.cfg, **{which: _changed(getattr(model.cfg, which), inner, changes)}))


def _changed(cfg: Any, inner: str, changes: Mapping[str, Any]) -> Any:
    return replace(cfg, **({inner: replace(getattr(cfg, inner), **changes)} if inner else changes))


def whole(model: Any, **changes: Any) -> Any:
    """Change fields of what joins the towers."""
    return model.clone(cfg=replace(model.cfg, **changes))


MUTANTS = {
    "erf instead of quick GELU in the text": ("clip", lambda m, p: (tower(m, "text.mlp", activation="gelu"), p)),
    "erf instead of quick GELU in the image": ("clip", lambda m, p: (tower(m, "image.mlp", activation="gelu"), p)),
    "a text that looks ahead": ("clip", lambda m, p: (tower(m, "text.attention", causal=False), p)),
    "a text read at its last position": ("clip", lambda m, p: (whole(m, read="last"), p)),
    "a text read at another token": ("clip-text", lambda m, p: (m.clone(end_id=7), p)),
    "the embeddings not normalised": ("clip-image", lambda m, p: (tower(m, "image", norm_embed=False), p)),
    "the mean of the patches": ("clip-image", lambda m, p: (tower(m, "image", pool="mean"), p)),
    "another epsilon": ("clip-largest", lambda m, p: (tower(m, "text.norm", epsilon=1e-5), p)),
    "the two norms of a layer swapped": ("clip", lambda m, p: (m, swap(p, "norm_attn", "norm_mlp"))),
    "a square kernel not transposed": ("clip-text", lambda m, p: (m, edit(p, "attn/o/kernel", turned))),
    "the scale taken twice": ("clip", lambda m, p: (m, edit(p, "scale", lambda x: jnp.exp(x) if x.ndim == 0 else x))),
    "a text that cannot look ahead": ("siglip", lambda m, p: (tower(m, "text.attention", causal=True), p)),
    "the logits' bias lost": ("siglip", lambda m, p: (m, {**p, "bias": jnp.zeros(())})),
    "q and k of the pooling swapped": (
        "siglip-image", lambda m, p: (m, swap(p, "head/attn/q/", "head/attn/k/"))
    ),
    "erf instead of tanh GELU": ("siglip-image", lambda m, p: (tower(m, "image.mlp", activation="gelu"), p)),
    "the projection's bias lost": ("siglip-text", lambda m, p: (m, edit(p, "project/bias", jnp.zeros_like))),
}  # fmt: skip
