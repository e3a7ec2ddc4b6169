"""Tiny ViTs, DINOv2s and MAEs of transformers, and what they compute on the images of `vit_task`."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from tests.parity import vit_task
from tests.parity.vit_task import LABELS

_base = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
_vit = {**_base, "intermediate_size": 28}
_mae = {
    **_vit, "decoder_hidden_size": 24, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 20, "norm_pix_loss": True,
}  # fmt: skip

# name -> (family, task, options, (height, width))
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, int]]] = {
    "vit-labels": ("ViT", "ForImageClassification", _vit, (16, 16)),
    "vit-oblong": (
        "ViT", "ForImageClassification",
        {**_vit, "image_size": [12, 20], "num_channels": 1, "layer_norm_eps": 1e-6, "num_attention_heads": 4}, (12, 20),
    ),
    "vit-no-bias": ("ViT", "ForImageClassification", {**_vit, "qkv_bias": False, "hidden_act": "gelu_new"}, (16, 16)),
    "vit-interpolated": ("ViT", "ForImageClassification", _vit, (24, 12)),
    "dinov2": ("Dinov2", "Model", _base, (12, 20)),
    "dinov2-labels": ("Dinov2", "ForImageClassification", {**_base, "layerscale_value": 0.5}, (16, 16)),
    "dinov2-gated": ("Dinov2", "ForImageClassification", {**_base, "use_swiglu_ffn": True}, (20, 20)),
    "registers": ("Dinov2WithRegisters", "Model", {**_base, "num_register_tokens": 3, "mlp_ratio": 2}, (8, 20)),
    "registers-labels": ("Dinov2WithRegisters", "ForImageClassification", _base, (12, 28)),
    "registers-gated": (
        "Dinov2WithRegisters", "ForImageClassification",
        {**_base, "use_swiglu_ffn": True, "num_register_tokens": 1, "qkv_bias": False}, (16, 16),
    ),
    "mae": ("ViTMAE", "ForPreTraining", _mae, (16, 16)),
    "mae-pixels": (
        "ViTMAE", "ForPreTraining", {**_mae, "image_size": 20, "mask_ratio": 0.6, "norm_pix_loss": False}, (20, 20)
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """Return the peer, freshly initialised, in evaluation mode; an MAE with the tables that it should have drawn."""
    family, task, options, _ = CASES[name]
    torch.manual_seed(0)
    labelled = {"num_labels": LABELS} if task == "ForImageClassification" else {}
    cfg = getattr(transformers, f"{family}Config")(**options, **labelled)
    cfg.architectures = [family + task]
    cfg._attn_implementation = "eager"
    model = getattr(transformers, family + task)(cfg).eval()
    if family == "ViTMAE":
        # 5.23 leaves both tables and both tokens at zero, where a wrong position could not be seen
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.data.copy_(sincos(int((table.shape[1] - 1) ** 0.5), table.shape[2]))
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            torch.nn.init.normal_(token, std=0.02)
    return model


def sincos(side: int, width: int) -> torch.Tensor:
    """Return the table of published MAEs: the halves of height and width change places."""
    found = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    return torch.cat([found[:, width // 2 :], found[:, : width // 2]], dim=1)[None]


def rows(name: str) -> dict[str, np.ndarray]:
    """Return the batch of a case."""
    _, _, options, size = CASES[name]
    return vit_task.batch(size, options.get("num_channels", 3), options["patch_size"], options["hidden_size"])


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Return the weights under the names of the file: in memory transformers 5 has others."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def theirs(name: str, model: Any) -> dict[str, Any]:
    """Return the peer's numbers: outputs, hidden states [1 + L, B, N, D], loss, gradients by name in the file."""
    family, task = CASES[name][:2]
    given = {key: torch.from_numpy(field) for key, field in rows(name).items()}
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
    states: dict[str, list[torch.Tensor]] = {side: [] for side in stacks}
    hooks = []
    for side, layers in stacks.items():
        kept = states[side]
        hooks.append(layers[0].register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0])))
        hooks += [layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out)) for layer in layers]
    model.zero_grad()
    out = model(given["image"].permute(0, 3, 1, 2), **more)
    final = out.last_hidden_state if task == "Model" else out.logits
    loss = (final @ given["readout"]).mean() if task == "Model" else out.loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    slopes = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, other in zip(slopes.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(other) if other.grad is None else other.grad)
    return {
        "outputs": {
            "out": final.detach().numpy(),
            **{side: torch.stack(kept).detach().numpy() for side, kept in states.items()},
        },
        "loss": loss.item(),
        "gradients": tensors(slopes),
    }
