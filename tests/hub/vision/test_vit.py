"""ViT's, DINOv2's and MAE's config.json and names, in both directions, against what the published files hold."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays
from fm_jax.hub.vision import vit
from fm_jax.models.vision import mae
from fm_jax.models.vision import vit as models
from fm_jax.models.vision.classifier import ImageClassifier
from tests.close import close
from tests.goldens.stored import Golden
from tests.hub import forms

GOLDEN = Golden("vit")
PEERS = GOLDEN.peers


def module(config):
    return families.build(Fields(config, "config.json"))[1]


def read(model, given):
    return table.read(vit.table(model), families.abstract(model), Arrays(given))


@pytest.mark.parametrize("case", PEERS)
def test_a_config_comes_back_as_the_module_it_was_written_from(case):
    model = module(PEERS[case]["config"])
    config = vit.fields(model)
    assert config["architectures"] == PEERS[case]["config"]["architectures"]
    assert module(json.loads(json.dumps(config))) == model
    for name, value in config.items():
        if name not in ("use_mask_token", "hidden_act", "id2label"):
            assert PEERS[case]["config"][name] == value, name


@pytest.mark.parametrize("case", PEERS)
def test_tensors_come_back_under_their_names(case):
    model, given = module(PEERS[case]["config"]), GOLDEN.numbered(case)
    written = dict(table.write(vit.table(model), read(model, given)))
    for name, tensor in given.items():
        if "embeddings.mask_token" in name:
            continue
        published = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
        prefix = "dinov2." if case == "dinov2" else ""  # base models may have none
        np.testing.assert_array_equal(written.pop(prefix + published), tensor, err_msg=name)
    assert not written


def test_a_gated_layers_gate_comes_first():
    model = module(PEERS["dinov2-gated"]["config"])
    given = GOLDEN.numbered("dinov2-gated")
    found = read(model, given)["backbone"]["blocks"]["mlp"]
    fused = given["dinov2.encoder.layer.1.mlp.weights_in.weight"]
    np.testing.assert_array_equal(found["gate"]["kernel"][1], fused[:48].T)
    np.testing.assert_array_equal(found["up"]["kernel"][1], fused[48:].T)


PUBLISHED = {
    "vit": (
        {
            "architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0, "encoder_stride": 16,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768, "image_size": 224,
            "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "model_type": "vit",
            "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True,
        },
        ImageClassifier(models.ViT(replace(models.vit_b16(), norm=models.NormConfig("layer", 1e-12))), 2),
    ),
    "mae": (
        {
            "architectures": ["ViTMAEForPreTraining"], "attention_probs_dropout_prob": 0.0, "decoder_hidden_size": 512,
            "decoder_intermediate_size": 2048, "decoder_num_attention_heads": 16, "decoder_num_hidden_layers": 8,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024, "image_size": 224,
            "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-12, "mask_ratio": 0.75,
            "model_type": "vit_mae", "norm_pix_loss": False, "num_attention_heads": 16, "num_channels": 3,
            "num_hidden_layers": 24, "patch_size": 16, "qkv_bias": True,
        },
        mae.MAE(
            replace(mae.mae_large()[0], standardise=False),
            models.ViT(replace(mae.mae_large()[1], norm=models.NormConfig("layer", 1e-12))),
        ),
    ),
    "dinov2": (
        {
            "apply_layernorm": True, "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768,
            "image_size": 518, "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0,
            "mlp_ratio": 4, "model_type": "dinov2", "num_attention_heads": 12, "num_channels": 3,
            "num_hidden_layers": 12, "out_features": ["stage12"], "out_indices": [12], "patch_size": 14,
            "qkv_bias": True, "reshape_hidden_states": True, "stage_names": ["stem", "stage1"],
            "use_swiglu_ffn": False,
        },
        models.ViT(replace(models.dinov2_base(), layer_scale=1.0)),
    ),
    "dinov2 with registers": (
        {
            "apply_layernorm": True, "architectures": ["Dinov2WithRegistersModel"], "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 384,
            "image_size": 518, "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0,
            "mlp_ratio": 4, "model_type": "dinov2_with_registers", "num_attention_heads": 6, "num_channels": 3,
            "num_hidden_layers": 12, "num_register_tokens": 4, "patch_size": 14, "qkv_bias": True,
            "use_swiglu_ffn": False,
        },
        models.ViT(replace(models.dinov2_small(registers=4), layer_scale=1.0)),
    ),
    "dinov2 giant": (
        {
            "architectures": ["Dinov2Model"], "hidden_size": 1536, "image_size": 518, "layer_norm_eps": 1e-06,
            "mlp_ratio": 4, "model_type": "dinov2", "num_attention_heads": 24, "num_hidden_layers": 40,
            "patch_size": 14, "use_swiglu_ffn": True,
        },
        models.ViT(replace(models.dinov2_giant(), layer_scale=1.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_sizes(name):
    config, model = PUBLISHED[name]
    assert module(config) == model


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("vit-labels", {"hidden_act": "swish"}, "hidden_act 'swish' is not supported"),
        ("vit-labels", {"patch_size": [4, 2]}, "patch_size 4 × 2 is not supported, only square"),
        ("vit-labels", {"image_size": [16, 16, 3]}, r"image_size \[16, 16, 3\] is not the size of an image"),
        ("vit-labels", {"image_size": -1}, "is not the size of an image"),
        ("vit-labels", {"image_size": 18}, "images of 18 × 18 are not divisible into patches of 4"),
        ("vit-labels", {"num_attention_heads": 3}, "is not divisible by the number of heads, 3"),
        ("vit-labels", {"rotary": 1}, "rotary .* is unknown"),
        ("vit-labels", {"architectures": ["ViTForMaskedImageModeling"]}, "architectures is ViTForMaskedImageModeling"),
        ("mae", {"architectures": ["ViTMAEModel"]}, "architectures is ViTMAEModel; supported is ViTMAEForPreTraining"),
        ("mae", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob is 0.1"),
        ("mae", {"image_size": [16, 20]}, "image_size .* is not square"),
        ("mae", {"mask_ratio": 1.0}, "mask_ratio must be in"),
        ("registers-labels", {"num_register_tokens": 0}, "num_register_tokens is 0"),
        ("dinov2", {"num_register_tokens": 4}, "num_register_tokens .* is unknown"),
        ("dinov2", {"layerscale_value": 0.0}, "layerscale_value is 0.0"),
        ("dinov2", {"image_size": [16, 20]}, "image_size .* is not square"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(case, changes, message):
    with pytest.raises(CheckpointError, match=message):
        module({**PEERS[case]["config"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "mean"}, "cfg.pool mean"),
        ({"layer_scale": 0.1}, "cfg.pool cls"),  # DINOv2's classifier reads both
        ({"patches": replace(models.tiny().patches, any_size=True)}, "cfg.patches.any_size True"),
        ({"patches": replace(models.tiny().patches, positions="sincos")}, "cfg.patches.positions sincos"),
        ({"mlp": replace(models.tiny().mlp, activation="silu", gated=True)}, "cfg.mlp.gated True"),
        ({"registers": 4, "layer_scale": 0.1, "pool": "both"}, "cfg.patches.resizing bicubic"),
    ],
)
def test_what_transformers_has_not_is_not_written(changes, message, tmp_path):
    model = ImageClassifier(models.ViT(replace(models.tiny(), **changes)), 3)
    with pytest.raises(CheckpointError, match=message):
        pretrained.save(tmp_path / "out", model, forms.draw(model))
    assert not (tmp_path / "out").exists()


def test_a_drop_path_of_training_is_no_obstacle(tmp_path):
    """The recipes of DeiT and MAE train with 0.1; whoever runs the model never meets it."""
    model = ImageClassifier(models.ViT(replace(models.tiny(), drop_path=0.1)), 3)
    params = forms.draw(model)
    pretrained.save(tmp_path / "out", model, params)
    found = pretrained.load(tmp_path / "out")
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    want, got = (np.asarray(m.apply({"params": p}, image)) for m, p in ((model, params), (found.module, found.params)))
    close(got, want)


def test_a_mask_token_is_written_beside_registers_and_passed_over_when_read(tmp_path):
    model, _ = forms.build(forms.FORMS["registers"])
    params = forms.draw(model)
    pretrained.save(tmp_path / "out", model, params, dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found = stored["dinov2_with_registers.embeddings.mask_token"]
    assert (found.shape, found.dtype.name, found.any()) == ((1, 16), "bfloat16", False)
    assert stored["dinov2_with_registers.embeddings.register_tokens"].shape == (1, 3, 16)
    assert pretrained.load(tmp_path / "out").module == model
    plain, _ = forms.build(forms.FORMS["dinov2"])
    pretrained.save(tmp_path / "plain", plain, forms.draw(plain))
    assert "dinov2.embeddings.mask_token" not in load_file(tmp_path / "plain" / "model.safetensors")


def test_a_file_that_lacks_a_layer_or_has_one_too_many_is_refused():
    config, given = PEERS["mae"]["config"], GOLDEN.numbered("mae")
    with pytest.raises(CheckpointError, match=r"vit.encoder.layer.2.* not stored"):
        read(module({**config, "num_hidden_layers": 3}), given)
    with pytest.raises(CheckpointError, match="the model has no such parameter"):
        read(module({**config, "decoder_num_hidden_layers": 1}), given)
