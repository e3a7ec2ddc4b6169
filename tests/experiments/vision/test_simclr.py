"""SimCLR's pretraining and the probe: what they refuse, and that every way of probing is given the same labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.vision import linear_probe, simclr_pretrain
from fm_jax.checkpoint import model as models
from fm_jax.core.config import from_dict, to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.data.images import pictures, views
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import efficientnet, resnet, vit
from fm_jax.tasks import vision as vision_models
from tests.close import close

pytestmark = pytest.mark.slow


def test_one_view_of_an_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="views must be 2, not 1"):
        replace(simclr_pretrain.debug(), data=pictures.Config(recipe=views.digits()))


def test_parts_of_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="accumulate must be 1"):
        replace(simclr_pretrain.debug(), accumulate=2)


def test_small_views_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.recipe\.small must be 0, not 2"):
        replace(
            simclr_pretrain.debug(), data=pictures.Config(recipe=replace(views.digits(2), small=2, geometry="crop"))
        )


def test_a_batch_that_devices_cannot_share_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size 12 .* does not divide over 8 shards"):
        simclr_pretrain.run(replace(simclr_pretrain.debug(), batch_size=12), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_presets_are_the_papers() -> None:
    paper, small = simclr_pretrain.config(), simclr_pretrain.cifar10()
    close(paper.learning_rate, 0.3 * paper.batch_size / 256, 1e-9)
    assert paper.fit.num_steps == 1000 * 1_268_355 // 4096
    close(paper.warmup * paper.fit.num_steps, 10 * 1_268_355 / 4096, 1e-5)
    assert (small.data.recipe.blur, small.data.recipe.jitter, small.temperature) == (0, 0.5, 0.5)
    close(small.learning_rate, 1.0 * small.batch_size / 256, 1e-9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    simclr_pretrain.run(simclr_pretrain.debug(), workdir)
    return workdir


@pytest.mark.parametrize("backbone", [vit.tiny(), efficientnet.tiny()], ids=["vit", "efficientnet"])
def test_any_backbone_learns_by_contrast_and_is_opened_again(backbone: vision_models.Backbone, tmp_path: Path) -> None:
    cfg = replace(simclr_pretrain.debug(), backbone=backbone)
    if isinstance(backbone, efficientnet.Config):
        cfg = replace(cfg, data=replace(cfg.data, size=16))
    assert np.isfinite(simclr_pretrain.run(cfg, tmp_path)["loss"])
    found = vision_models.load(tmp_path)
    assert found.module == models.of(backbone)
    assert from_dict(simclr_pretrain.Config, to_dict(cfg)) == cfg


def test_a_draw_is_the_same_labels_for_every_way_and_another_for_the_next(run: Path, tmp_path: Path) -> None:
    cfg = replace(linear_probe.debug(), models=(run,))
    setup = linear_probe.Setup(cfg, simclr_pretrain.debug().data, tmp_path)
    truth = setup.features("pixels", 0)[0].labels
    np.testing.assert_array_equal(truth, setup.features("pretrained", 0)[0].labels)
    rows = [setup.rows(truth, 3, draw) for draw in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert set(rows[0]) != set(rows[2])
    np.testing.assert_array_equal(np.bincount(truth[rows[0]]), np.full(10, 3))
    assert len(setup.rows(truth, 0, 0)) == len(truth)
    assert setup.probe("pixels", 0, 0) > 0.9  # with all labels even a linear classifier of pixels knows digits


def test_runs_of_two_networks_are_not_averaged(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    simclr_pretrain.run(replace(simclr_pretrain.debug(), backbone=replace(resnet.tiny(), zero_init=False)), other)
    with pytest.raises(ConfigError, match="other has another architecture"):
        linear_probe.run(replace(linear_probe.debug(), models=(run, other)), tmp_path / "probe")


def test_a_public_folder_needs_data_to_be_probed_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no data; set the images to probe it on"):
        linear_probe.run(replace(linear_probe.debug(), models=(tmp_path,)), tmp_path / "probe")


def test_what_is_read_of_a_transformer_is_a_choice_and_of_a_network_without_tokens_none(run: Path) -> None:
    own = Pretrained(vit.ViT(vit.tiny()), {"embed": {}}, None)
    read = linear_probe.pooled(own, "mean")
    assert read.module == vit.ViT(replace(vit.tiny(), pool="mean")) and read.params is own.params
    assert linear_probe.pooled(own, None) is own
    with pytest.raises(ConfigError, match="pool mean needs a Vision Transformer, not a model of class ResNet"):
        linear_probe.pooled(vision_models.load(run), "mean")
