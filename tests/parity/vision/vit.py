"""ViT, DINOv2 and MAE: a tiny config.json of every form."""

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
