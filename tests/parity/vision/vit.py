"""ViT, DINOv2 and MAE: a tiny config.json of every form, and what live torch is compared on."""

import copy
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from fm_jax.core import tree
from fm_jax.layers.tap import ENCODER, Tap
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.mae import MAE
from fm_jax.objectives import classify, reconstruct
from tests.parity import torch_models
from tests.parity.changes import cfg, change, edit, part, swap, turned
from tests.parity.labels import LABELS

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

FORMS = {
    "vit": {**_vit, **LABELS},
    "vit-base": {**_vit, "image_size": [8, 12], "qkv_bias": False, "architectures": ["ViTModel"]},
    "dinov2": {**_dinov2, **LABELS},
    "dinov2-gated": {**_dinov2, "use_swiglu_ffn": True, "architectures": ["Dinov2Model"]},
    "registers": {**_dinov2, "model_type": "dinov2_with_registers", "num_register_tokens": 3,
                  "architectures": ["Dinov2WithRegistersForImageClassification"], **LABELS},
    "mae": _mae,
}  # fmt: skip

FEW = ("vit", "dinov2-gated", "registers", "mae")  # one of each way of naming and storing

ROWS, CLASSES = 3, 5
KEPT = ("embed", "block.resid_post")
TOLERANCE = 2e-5  # of the peer's standard deviation, in float32 on CPU: ten times what was measured
INSIDES = ()  # no padding

_base = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
_vit_peer = {**_base, "intermediate_size": 28}
_mae_peer = {
    **_vit_peer, "decoder_hidden_size": 24, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 20, "norm_pix_loss": True,
}  # fmt: skip

# name -> (family, task, options, (height, width))
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, int]]] = {
    "vit-labels": ("ViT", "ForImageClassification", _vit_peer, (16, 16)),
    "vit-oblong": (
        "ViT", "ForImageClassification",
        {**_vit_peer, "image_size": [12, 20], "num_channels": 1, "layer_norm_eps": 1e-6, "num_attention_heads": 4},
        (12, 20),
    ),
    "vit-no-bias": (
        "ViT", "ForImageClassification", {**_vit_peer, "qkv_bias": False, "hidden_act": "gelu_new"}, (16, 16)
    ),
    "vit-interpolated": ("ViT", "ForImageClassification", _vit_peer, (24, 12)),
    "dinov2": ("Dinov2", "Model", _base, (12, 20)),
    "dinov2-labels": ("Dinov2", "ForImageClassification", {**_base, "layerscale_value": 0.5}, (16, 16)),
    "dinov2-gated": ("Dinov2", "ForImageClassification", {**_base, "use_swiglu_ffn": True}, (20, 20)),
    "registers": ("Dinov2WithRegisters", "Model", {**_base, "num_register_tokens": 3, "mlp_ratio": 2}, (8, 20)),
    "registers-labels": ("Dinov2WithRegisters", "ForImageClassification", _base, (12, 28)),
    "registers-gated": (
        "Dinov2WithRegisters", "ForImageClassification",
        {**_base, "use_swiglu_ffn": True, "num_register_tokens": 1, "qkv_bias": False}, (16, 16),
    ),
    "mae": ("ViTMAE", "ForPreTraining", _mae_peer, (16, 16)),
    "mae-pixels": (
        "ViTMAE", "ForPreTraining", {**_mae_peer, "image_size": 20, "mask_ratio": 0.6, "norm_pix_loss": False}, (20, 20)
    ),
}  # fmt: skip


def peer(name: str, *, moved: bool = True) -> Any:
    """Return the peer in evaluation mode, freshly initialised or moved; an MAE with the tables it should have drawn."""
    import torch
    import transformers

    family, task, options, _ = CASES[name]
    torch.manual_seed(0)
    labelled = {"num_labels": CLASSES} if task == "ForImageClassification" else {}
    config = getattr(transformers, f"{family}Config")(**options, **labelled)
    config.architectures = [family + task]
    config._attn_implementation = "eager"
    model = getattr(transformers, family + task)(config).eval()
    if family == "ViTMAE":
        # 5.23 leaves both tables and both tokens at zero, where a wrong position could not be seen
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.data.copy_(sincos(int((table.shape[1] - 1) ** 0.5), table.shape[2]))
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            torch.nn.init.normal_(token, std=0.02)
    return torch_models.perturb(model) if moved else model


def sincos(side: int, width: int) -> Any:
    """Return the table of published MAEs: the halves of height and width change places."""
    import torch
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    found = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    return torch.cat([found[:, width // 2 :], found[:, : width // 2]], dim=1)[None]


def images(size: tuple[int, int], channels: int, patch_size: int, width: int) -> dict[str, np.ndarray]:
    """Return images, their labels, a noise for each patch, and a readout [D] of hidden states."""
    rng = np.random.default_rng(1)
    count = size[0] * size[1] // patch_size**2
    return {
        "image": rng.normal(0.2, 1, (ROWS, *size, channels)).astype(np.float32),
        "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "noise": rng.permuted(np.tile(np.arange(count), (ROWS, 1)), axis=1).astype(np.float32) / count,
        "readout": rng.normal(size=width).astype(np.float32),
    }


def batch(name: str) -> dict[str, np.ndarray]:
    """Return the batch of a case."""
    _, _, options, size = CASES[name]
    return images(size, options.get("num_channels", 3), options["patch_size"], options["hidden_size"])


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Return the weights under the names of the file: in memory transformers 5 has others."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def theirs(name: str, model: Any) -> dict[str, Any]:
    """Return the peer's answer: outputs, states [1 + L, B, N, D], loss, gradients by name in the file."""
    import torch

    family, task = CASES[name][:2]
    given = {key: torch.from_numpy(field) for key, field in batch(name).items()}
    more: dict[str, Any] = {}
    if task == "ForImageClassification":
        more["labels"] = given["label"].long()
    if name == "vit-interpolated":
        more["interpolate_pos_encoding"] = True
    if family == "ViTMAE":
        more["noise"] = given["noise"]
    stacks = {"states": model.base_model.encoder.layer if "Dinov2" in family else model.base_model.layers}
    if family == "ViTMAE":
        stacks = {"encoder.states": stacks["states"], "states": model.decoder.decoder_layers}
    model.zero_grad()
    with ExitStack() as stack:
        states = {side: stack.enter_context(torch_models.watched(layers)) for side, layers in stacks.items()}
        out = model(given["image"].permute(0, 3, 1, 2), **more)
    final = out.last_hidden_state if task == "Model" else out.logits
    loss = (final @ given["readout"]).mean() if task == "Model" else out.loss
    loss.backward()
    slopes = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, other in zip(slopes.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(other) if other.grad is None else other.grad)
    return {
        "outputs": {"out": final.detach().numpy()},
        "states": {side: torch_models.stacked(kept) for side, kept in states.items()},
        "loss": loss.item(),
        "gradients": tensors(slopes),
    }


def ours(model: Any, rows: Mapping[str, np.ndarray]) -> Any:
    """Return a jitted params -> our answer."""
    model = _at(model, rows["image"].shape[1:3])
    image, noise = jnp.asarray(rows["image"]), jnp.asarray(rows["noise"])
    if isinstance(model, MAE):
        loss_fn, inputs = reconstruct.masked_patches(model.apply), (image, noise)
    else:
        loss_fn, inputs = classify.softmax(model.apply, ("image",)), (image,)
    fields = {"image": image, "noise": noise, "label": jnp.asarray(rows["label"]), "weights": jnp.ones(ROWS)}
    sides = (ENCODER, "") if isinstance(model, MAE) else ("",)
    tap = Tap(read=tuple(side + site for side in sides for site in KEPT))

    def mean(params: Any) -> jax.Array:
        if isinstance(model, MAE | ImageClassifier):
            total, weight, *_ = loss_fn(params, fields, None)
            return total / weight
        return (model.apply({"params": params}, image, method="hidden") @ rows["readout"]).mean()

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        method = "__call__" if isinstance(model, MAE | ImageClassifier) else "hidden"
        out, kept = model.apply({"params": params}, *inputs, tap=tap, mutable=["taps"], method=method)
        read = {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept["taps"])}
        states = {}
        for side in sides:
            first, rest = (read[f"site:{side}{site}"] for site in KEPT)
            states[f"{side}states"] = jnp.concatenate([first[None], rest])
        loss, slopes = jax.value_and_grad(mean)(params)
        return {"outputs": {"out": out}, "states": states, "loss": loss, "gradients": slopes}

    return compute


def _at(model: Any, size: tuple[int, int]) -> Any:
    """Let a model take images of another size than its own: transformers is told so at the call."""
    return model if cfg(model).patches.image_size == size else part(model, "patches", any_size=True)


MUTANTS = {
    "tanh instead of erf GELU": ("vit-labels", lambda m, p: (part(m, "mlp", activation="gelu_tanh"), p)),
    "erf instead of tanh GELU": ("vit-no-bias", lambda m, p: (part(m, "mlp", activation="gelu"), p)),
    "mean instead of [CLS]": ("vit-labels", lambda m, p: (change(m, pool="mean"), p)),
    "q and k swapped": ("vit-labels", lambda m, p: (m, swap(p, "attn/q/", "attn/k/"))),
    "k and v swapped": ("dinov2-labels", lambda m, p: (m, swap(p, "attn/k/", "attn/v/"))),
    "the two norms of a layer swapped": ("vit-labels", lambda m, p: (m, swap(p, "norm_attn", "norm_mlp"))),
    "the two scales of a layer swapped": ("dinov2-labels", lambda m, p: (m, swap(p, "scale_attn", "scale_mlp"))),
    "gate and up swapped": ("dinov2-gated", lambda m, p: (m, swap(p, "mlp/gate/", "mlp/up/"))),
    "a square kernel not transposed": (
        "vit-labels", lambda m, p: (m, edit(p, "attn/o/kernel", turned))
    ),
    "[CLS] lost": ("vit-labels", lambda m, p: (m, edit(p, "embed/cls", jnp.zeros_like))),
    "[CLS]'s position behind": (
        "vit-labels", lambda m, p: (m, edit(p, "embed/positions", lambda x: jnp.roll(x, -1, 0)))
    ),
    "a patch's rows read as columns": (
        "vit-labels", lambda m, p: (m, edit(p, "embed/kernel", lambda x: x.swapaxes(0, 1)))
    ),
    "channels in reverse": ("vit-labels", lambda m, p: (m, edit(p, "embed/kernel", lambda x: x[:, :, ::-1]))),
    "one layer fewer": (
        "vit-oblong", lambda m, p: (change(m, num_layers=1), tree.map_with_path(_first_layer, p))
    ),
    "registers lost": ("registers-labels", lambda m, p: (m, edit(p, "embed/registers", jnp.zeros_like))),
    "registers' positions resized as DINOv2's": (
        "registers-labels", lambda m, p: (
            part(m, "patches", resizing="bicubic"), p)
    ),
    "the decoder's positions lost": ("mae", lambda m, p: (m, edit(p, "decoder/embed/positions", jnp.zeros_like))),
    "the mask token lost": ("mae", lambda m, p: (m, edit(p, "embed/mask", jnp.zeros_like))),
}  # fmt: skip


def _first_layer(path, leaf):
    return leaf[:1] if "/blocks/" in path else leaf
