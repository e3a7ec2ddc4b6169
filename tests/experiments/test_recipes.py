"""The paper-scale presets of image models: rates by their sources' rules, and what those sources leave out."""

import pytest

from experiments import efficientnet_imagenet, mae_pretrain, resnet_imagenet, vit_finetune, vit_imagenet


def test_rates_follow_from_the_batch_by_each_sources_rule() -> None:
    resnet, deit, tuned = resnet_imagenet.config(), vit_imagenet.config(), vit_finetune.config()
    scaled, masked = efficientnet_imagenet.config(), mae_pretrain.config()
    assert resnet.learning_rate == pytest.approx(0.1 * resnet.batch_size / 256)  # Goyal et al. 2017, section 5.1
    assert deit.learning_rate == pytest.approx(5e-4 * deit.batch_size / 512)  # DeiT, table 9
    assert tuned.learning_rate == pytest.approx(5e-4 * tuned.batch_size / 256)  # FINETUNE.md of facebookresearch/mae
    assert masked.learning_rate == pytest.approx(1.5e-4 * masked.batch_size / 256)  # He et al. 2022, table 8
    assert scaled.learning_rate == pytest.approx(0.016 * scaled.batch_size / 256)  # main.py of EfficientNet


def test_no_recipe_of_an_image_model_clips_gradients() -> None:
    for recipe in (resnet_imagenet, efficientnet_imagenet, vit_imagenet, vit_finetune, mae_pretrain):
        assert recipe.config().optimizer.clip_norm is None, recipe.__name__
