"""The paper-scale presets of image models: rates by their sources' rules, and what those sources leave out."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments.vision import (
    efficientnet_imagenet,
    mae_pretrain,
    resnet_imagenet,
    simclr_pretrain,
    vit_finetune,
    vit_imagenet,
)
from fm_jax import cli
from fm_jax.data.images import pictures
from tests.close import close


def test_rates_follow_from_the_batch_by_each_sources_rule() -> None:
    resnet, deit, tuned = resnet_imagenet.config(), vit_imagenet.config(), vit_finetune.config()
    scaled, masked = efficientnet_imagenet.config(), mae_pretrain.config()
    close(resnet.learning_rate, 0.1 * resnet.batch_size / 256, 1e-9)  # Goyal et al. 2017, section 5.1
    close(deit.learning_rate, 5e-4 * deit.batch_size / 512, 1e-9)  # DeiT, table 9
    close(tuned.learning_rate, 5e-4 * tuned.batch_size / 256, 1e-9)  # FINETUNE.md of facebookresearch/mae
    close(masked.learning_rate, 1.5e-4 * masked.batch_size / 256, 1e-9)  # He et al. 2022, table 8
    close(scaled.learning_rate, 0.016 * scaled.batch_size / 256, 1e-9)  # main.py of EfficientNet


def test_no_recipe_of_an_image_model_clips_gradients() -> None:
    for recipe in (resnet_imagenet, efficientnet_imagenet, vit_imagenet, vit_finetune, mae_pretrain):
        assert recipe.config().optimizer.clip_norm is None, recipe.__name__


@pytest.mark.parametrize(
    "experiment",
    [resnet_imagenet, efficientnet_imagenet, vit_imagenet, vit_finetune, mae_pretrain, simclr_pretrain],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_a_run_that_met_too_many_broken_images_goes_on_with_more_allowed(
    experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be met after the last step, in the test; what is seen does not depend on how many are allowed."""
    starts: list[Any] = []
    monkeypatch.setattr(cli, "main", lambda *_, resumable: starts.append(resumable))
    monkeypatch.delitem(sys.modules, experiment.__name__)
    runpy.run_module(experiment.__name__, run_name="__main__")
    assert "data.max_bad" in starts[0]
    data = experiment.debug().data
    marks = {pictures.training(replace(data, max_bad=share), tmp_path).fingerprint for share in (0.0, 0.5)}
    assert len(marks) == 1
