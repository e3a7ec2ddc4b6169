"""CLIP's and SigLIP's config.json and names, in both directions, against what the published files hold."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.data.text import captions
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays
from fm_jax.hub.multimodal import clip
from fm_jax.hub.preprocessing import Preprocessing
from fm_jax.models.multimodal import clip as models
from tests.goldens.stored import Golden
from tests.hub import forms

GOLDEN = Golden("clip")


def module(config):
    return families.build(Fields(config, "config.json"))[1]


@pytest.mark.parametrize("case", GOLDEN.peers)
def test_tensors_come_back_under_their_names(case):
    model, given = module(GOLDEN.peers[case]["config"]), GOLDEN.numbered(case)
    params = table.read(clip.table(model), families.abstract(model), Arrays(given))
    written = dict(table.write(clip.table(model), params))
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_the_pooling_attention_is_stored_as_one_matrix():
    model, given = module(GOLDEN.peers["siglip"]["config"]), GOLDEN.numbered("siglip")
    head = table.read(clip.table(model), families.abstract(model), Arrays(given))["image"]["backbone"]["head"]
    fused = given["vision_model.head.attention.in_proj_weight"]
    for part, name in enumerate("qkv"):
        np.testing.assert_array_equal(head["attn"][name]["kernel"], fused[24 * part : 24 * (part + 1)].T)


_TOWER = {  # what the published files repeat of generation
    "attention_dropout": 0.0, "hidden_act": "quick_gelu", "initializer_factor": 1.0, "initializer_range": 0.02,
    "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20, "dropout": 0.0, "num_beams": 1,
    "do_sample": False, "add_cross_attention": False, "is_decoder": False, "pruned_heads": {}, "torch_dtype": None,
    "use_bfloat16": False,
}  # fmt: skip
PUBLISHED = {
    "b32": (
        {
            "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
            "model_type": "clip", "projection_dim": 512, "text_config_dict": None, "vision_config_dict": None,
            "text_config": {
                **_TOWER, "model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
                "hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 77, "num_attention_heads": 8,
                "num_hidden_layers": 12, "projection_dim": 512, "vocab_size": 49408,
            },
            "vision_config": {
                **_TOWER, "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
                "image_size": 224, "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12,
                "patch_size": 32, "projection_dim": 512,
            },
        },
        replace(models.clip_b32(), read="largest", end_id=0, start_scale=2.6592),
    ),
    "l14": (  # with towers stated twice; in transformers the second ones count, with the defaults of their class
        {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768,
            "text_config": {**_TOWER, "eos_token_id": 2, "hidden_size": 4},
            "text_config_dict": {
                "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
                "projection_dim": 768,
            },
            "vision_config_dict": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                "patch_size": 14, "projection_dim": 768,
            },
        },
        replace(models.clip_l14(), start_scale=2.6592),
    ),
    "siglip": (
        {
            "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", "vocab_size": 32000},
            "vision_config": {"model_type": "siglip_vision_model"},
        },
        replace(models.siglip_b16(), end_id=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_sizes(name):
    config, cfg = PUBLISHED[name]
    found = module(config).cfg
    trained = {"start_scale": cfg.start_scale, "start_bias": cfg.start_bias}
    for part in ("image", "text"):
        trained[part] = replace(getattr(found, part), init_std=getattr(cfg, part).init_std)
    assert replace(found, **trained) == cfg
    assert name == "siglip" or found.start_scale == 2.6592


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", {"architectures": ["CLIPForImageClassification"]}, "supported is CLIPModel"),
        ("clip", {"text_config": {"rotary": 1}}, "text_config.*rotary .* is unknown"),
        ("clip", {"vision_config": {"hidden_size": 24, "num_attention_heads": 5}}, "not divisible by the number of"),
        ("clip", {"vision_config": {"image_size": -1}}, "image_size -1 is not a number of pixels"),
        ("clip", {"vision_config": {"image_size": 30, "patch_size": 4}}, "not divisible into patches of 4"),
        ("clip", {"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id .* not int"),
        ("clip-text", {"architectures": ["CLIPTextClassifier"]}, "supported are CLIPTextModel and CLIPTextModelWith"),
        ("siglip", {"vision_config": {"vision_use_head": False}}, "vision_use_head is false"),
        ("siglip", {"text_config": {"projection_size": 7}}, "projection_size 7 .* is not the width 24"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(name, change, message):
    with pytest.raises(CheckpointError, match=message):
        module({**forms.FORMS[name], **change})


@pytest.mark.parametrize("name", ["clip", "clip-largest", "clip-text", "clip-image", "siglip"])
def test_a_folder_is_written_and_opened_again(name, tmp_path):
    model, _ = forms.build(forms.FORMS[name])
    params = forms.draw(model)
    pretrained.save(tmp_path / "one", model, params, dtype=None)
    found = pretrained.load(tmp_path / "one")
    assert found.module == model
    forms.assert_equal(found.params, params)
    half = pretrained.load(tmp_path / "one", dtype="bfloat16").module
    towers = (half.cfg.image, half.cfg.text) if isinstance(half, models.CLIP) else (half.backbone.cfg,)
    assert {tower.dtype for tower in towers} == {"bfloat16"}


@pytest.mark.parametrize("name", ["clip", "clip-largest", "clip-text", "clip-text-largest"])
def test_tokenizer_and_preprocessing_go_with_it(name, tmp_path):
    """The end token of the files does not replace the rule by which a text is read."""
    words = captions.train([f"a big red ring {i}" for i in range(30)], 518)
    config = json.loads(json.dumps(forms.FORMS[name.removesuffix("-largest") if "text" in name else name]))
    text = config.get("text_config", config)
    text |= {"vocab_size": 518, "eos_token_id": 2 if name.endswith("largest") else 517}
    model = module(config)
    views = None if "text" in name else Preprocessing(8, (0.5,) * 3, (0.25,) * 3, interpolation="bicubic")
    pretrained.save(tmp_path / "one", model, forms.draw(model), words, preprocessing=views)
    found = pretrained.load(tmp_path / "one")
    assert found.module == model
    assert found.tokenizer.fingerprint == words.fingerprint
    assert (found.preprocessing is None) == (views is None)


def test_a_form_that_transformers_has_not_is_not_written(tmp_path):
    model, _ = forms.build(forms.FORMS["clip"])
    odd = model.clone(cfg=replace(model.cfg, image=replace(model.cfg.image, norm_embed=False)))
    with pytest.raises(CheckpointError, match="norm_embed False"):
        pretrained.save(tmp_path / "out", odd, forms.draw(odd))
    assert not (tmp_path / "out").exists()
