"""A folder of transformers starts a run of ours on images, and what that leaves is a folder of theirs again."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments.hub import hub_convert
from experiments.vision import resnet_imagenet, vit_finetune
from fm_jax.checkpoint import read
from fm_jax.core import tree
from fm_jax.data.images import digits, pictures
from fm_jax.hub import pretrained
from fm_jax.models.vision import resnet
from fm_jax.tasks.init import Init
from tests.close import close
from tests.parity import torch_models

SIZE = {"height": 8, "width": 8}


def a_vit(init):
    """Return their model, and the run that starts from its folder."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 28}
    cfg = transformers.ViTConfig(**shape, image_size=8, patch_size=2, layer_norm_eps=1e-6, num_labels=3)
    run = replace(vit_finetune.debug(), init=init, pool="cls", learning_rate=0.0)
    return transformers.ViTForImageClassification(cfg), vit_finetune, run


def a_resnet(init):
    """Return their model, and the run that starts from its folder."""
    shape = {"embedding_size": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "layer_type": "basic"}
    backbone = resnet.Config((1, 1), (8, 16), "basic", stem_width=8)
    run = replace(resnet_imagenet.debug(), init=init, backbone=backbone, learning_rate=0.0)
    return (
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape, num_labels=3)),
        resnet_imagenet,
        run,
    )


@pytest.mark.parametrize("make", [a_vit, a_resnet])
def test_there_and_back(make, tmp_path, caplog):
    """At a rate of 0 the backbone stays theirs, but for running statistics; the head is ours, of ten classes."""
    model, experiment, run = make(Init(tmp_path / "theirs"))
    torch_models.perturb(model)
    model.eval().save_pretrained(tmp_path / "theirs")
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    processor = transformers.ViTImageProcessorPil(size=SIZE, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path / "theirs")
    experiment.run(run, tmp_path / "run")
    assert "--data.mean 0.4,0.5,0.6 --data.std 0.2,0.3,0.4" in caplog.text

    old = tree.flatten(pretrained.load(tmp_path / "theirs").backbone()[1])
    new = tree.flatten(read.load_params(tmp_path / "run" / "checkpoints")["backbone"])
    assert old.keys() == new.keys()
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert all(path.rpartition("/")[2] in ("mean", "var") for path in moved) and bool(moved) == (make is a_resnet)

    hub_convert.run(hub_convert.Config(tmp_path / "run", tmp_path / "ours"), tmp_path / "work")
    opened, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [opened.config.id2label[number] for number in range(10)] == list(digits.Digits("test", 0).classes)
    found = pretrained.load(tmp_path / "ours")
    picture = digits.Digits("test", 0)[0][0]
    seen = pictures.Evaluation(digits.Digits("test", 0), run.data, pictures.Labels(10))[0]["image"]
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    pixels = theirs(picture, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    close(pixels[0].permute(1, 2, 0).numpy(), seen)
    with torch.no_grad():
        want = opened.eval()(pixels).logits.numpy()
    got = jax.jit(lambda image: found.module.apply({"params": found.params}, image))(seen[None])
    close(got, want, 1e-4, scale=max(1.0, float(np.abs(want).max())))
