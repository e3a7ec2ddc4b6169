"""config.json of ResNets and EfficientNets; the general promises stand in test_families.py."""

from dataclasses import replace

import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays
from fm_jax.models.vision import efficientnet, resnet
from fm_jax.models.vision.classifier import ImageClassifier
from tests.hub.forms import FORMS, build, draw, tensors

# the fields of two public checkpoints' config.json that say how they compute
RESNET50 = {
    "architectures": ["ResNetForImageClassification"], "depths": [3, 4, 6, 3], "downsample_in_first_stage": False,
    "embedding_size": 64, "hidden_act": "relu", "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck",
    "model_type": "resnet", "num_channels": 3, "torch_dtype": "float32", "transformers_version": "4.18.0.dev0",
}  # fmt: skip
B2 = {
    "architectures": ["EfficientNetForImageClassification"], "batch_norm_eps": 0.001, "batch_norm_momentum": 0.99,
    "depth_coefficient": 1.2, "depth_divisor": 8, "depthwise_padding": [5, 8, 16], "drop_connect_rate": 0.2,
    "dropout_rate": 0.3, "expand_ratios": [1, 6, 6, 6, 6, 6, 6], "hidden_act": "swish", "hidden_dim": 1408,
    "image_size": 260, "in_channels": [32, 16, 24, 40, 80, 112, 192], "initializer_range": 0.02,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3], "model_type": "efficientnet", "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "num_channels": 3, "num_hidden_layers": 64, "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "pooling_type": "mean", "squeeze_expansion_ratio": 0.25, "strides": [1, 2, 2, 2, 1, 2, 1],
    "width_coefficient": 1.1,
}  # fmt: skip


def test_published_configs_are_the_presets():
    assert build(RESNET50)[0].backbone.cfg == resnet.resnet50()
    found = build(B2)[0]
    assert found.backbone.cfg == efficientnet.efficientnet_b2()
    assert found.dropout == efficientnet.SCALES[2].dropout


@pytest.mark.parametrize("name", ["resnet", "resnet-v1", "efficientnet"])
def test_counters_of_batches_are_passed_over_and_bare_names_known(name):
    model, family = build(FORMS[name])
    params = draw(model)
    given = tensors(model, params)
    given |= {key.replace("running_var", "num_batches_tracked"): np.array(7) for key in given if "running_var" in key}
    bare = {key.removeprefix(f"{FORMS[name]['model_type']}."): tensor for key, tensor in given.items()}
    assert bare.keys() != given.keys()
    for arrays in (given, bare):
        back = table.read(family.table(model), families.abstract(model), Arrays(arrays))
        for path, leaf in tree.flatten(params).items():
            np.testing.assert_array_equal(tree.flatten(back)[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("resnet", {"hidden_act": "gelu"}, 'only "relu" is supported'),
        ("resnet", {"downsample_in_first_stage": 1}, "downsample_in_first_stage is .*1.*, not bool"),
        ("resnet", {"layer_type": "preact"}, "layer_type 'preact' is not supported"),
        ("resnet", {"depths": [2, 1, 1]}, "must have one entry per stage"),
        ("resnet", {"depths": [2, 10**9]}, "depths .* is not a list of sizes"),
        ("resnet", {"architectures": ["ResNetBackbone"]}, "is ResNetBackbone; supported are ResNet"),
        ("efficientnet", {"pooling_type": "max"}, 'only "mean" is supported'),
        ("efficientnet", {"hidden_dim": 2560}, "hidden_dim is 2560"),
        ("efficientnet", {"depthwise_padding": []}, r"depthwise_padding has \[\], but image_size 42 needs"),
        ("efficientnet", {"image_size": 43, "depthwise_padding": [2, 6]}, "image_size is 43; only even sizes"),
        ("efficientnet", {"strides": [1, 2, 2]}, "must have equal lengths"),
        ("efficientnet", {"in_channels": [32, 16, 24, 40, 80, 112, 96]}, "in_channels"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(name, change, message):
    with pytest.raises(CheckpointError, match=message):
        build({**FORMS[name], **change})


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (resnet.ResNet(resnet.tiny()), "does not support backbone.cfg.stem small"),
        (resnet.ResNet(replace(resnet.tiny(), stem="pooled", norm_momentum=0.99)), "norm_momentum 0.99"),
        (efficientnet.EfficientNet(replace(efficientnet.Config(), stem_width=16)), "stem_width 16"),
    ],
)
def test_what_the_other_library_cannot_say_is_not_written(backbone, message, tmp_path):
    model = ImageClassifier(backbone, 5)
    with pytest.raises(CheckpointError, match=message):
        pretrained.check_form(model, families.writing(model).fields(model))


def test_a_head_without_a_bias_is_not_written():
    model = ImageClassifier(resnet.ResNet(resnet.resnet18()), 5, bias=False)
    with pytest.raises(CheckpointError, match="has a bias"):
        families.writing(model).fields(model)


def test_a_folder_comes_back_whole(tmp_path):
    model, _ = build(FORMS["efficientnet"])
    params = draw(model)
    pretrained.save(tmp_path / "folder", model, params, labels=("bad", "good", "so so"))
    back = pretrained.load(tmp_path / "folder")
    assert back.module == model
    assert back.labels == ("bad", "good", "so so")
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(tree.flatten(back.params)[path], leaf, err_msg=path)


def test_a_start_that_changes_no_number_is_no_obstacle():
    model = ImageClassifier(resnet.ResNet(replace(resnet.resnet18(), zero_init=False)), 5)
    data = families.writing(model).fields(model)
    pretrained.check_form(model, data)
    assert families.build(Fields(data, "config.json"))[1].backbone.cfg.zero_init
