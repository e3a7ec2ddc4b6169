from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from fm_jax.core import tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import CheckpointError, ConfigError, DataError
from fm_jax.data.images import folder as image_folder
from fm_jax.data.images import pictures, views
from fm_jax.data.images.mixup import Mix
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import resnet, vit
from fm_jax.optim import schedule
from fm_jax.tasks import image_classifier
from fm_jax.tasks import vision as vision_models
from fm_jax.tasks.image_classifier import Config, Setup
from fm_jax.tasks.init import Init
from fm_jax.train import loop, stage
from tests.close import close


def config(**changes: object) -> Config:
    made = Config(data=pictures.Config(recipe=views.digits()), fit=loop.FitConfig(2), learning_rate=1e-3, batch_size=16)
    return replace(made, **changes)  # type: ignore[arg-type]


def drawn(module: resnet.ResNet | vit.ViT, size: int, seed: int = 1) -> Pretrained:
    image = np.zeros((2, size, size, 3), np.float32)
    boxed = module.init(jax.random.key(seed), image, mutable=["params"])["params"]
    return Pretrained(module, jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: hasattr(x, "value")), None)


def folder(root: Path, names: dict[str, tuple[str, ...]]) -> Path:
    for split, classes in names.items():
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for copy in range(8):
                Image.new("RGB", (9, 8), (number * 90, copy, 0)).save(root / split / name / f"{copy}.png")
    return root


ALL = {"train": ("cat", "dog"), "validation": ("cat", "dog"), "test": ("cat", "dog")}


def test_an_image_size_that_the_patches_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images of 8 × 8 are not divisible into patches of 3"):
        vit.vit(2, 32, 4, 3, 8)
    backbone = vit.ViT(replace(vit.tiny(), patches=replace(vit.tiny().patches, any_size=True)))
    with pytest.raises(ConfigError, match="images of 9 × 9 are not divisible into patches of 2"):
        Setup(backbone, config(data=pictures.Config(size=9)), tmp_path)


def test_an_image_size_that_the_model_was_not_made_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 × 8, not 16 × 16"):
        Setup(vit.ViT(vit.tiny()), config(data=pictures.Config(size=16)), tmp_path)


def test_another_number_of_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[B, H, W, 1\], not \[2, 8, 8, 3\]; set in_channels"):
        Setup(resnet.ResNet(replace(resnet.tiny(), in_channels=1)), config(), tmp_path)


def test_a_missing_folder_and_a_split_with_an_unknown_class_are_refused(tmp_path: Path) -> None:
    data = pictures.Config(image_folder.Config(tmp_path / "none"))
    with pytest.raises(DataError, match=r"cannot read .*none/train"):
        Setup(resnet.ResNet(resnet.tiny()), config(data=data), tmp_path)
    root = folder(tmp_path / "found", ALL | {"test": ("cat", "horse")})
    with pytest.raises(DataError, match="'horse'"):
        Setup(resnet.ResNet(resnet.tiny()), config(data=replace(data, source=image_folder.Config(root))), tmp_path)


def test_more_classes_than_the_head_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 classes, more than num_classes 9"):
        Setup(resnet.ResNet(resnet.tiny()), config(data=pictures.Config(num_classes=9)), tmp_path)


def test_images_of_one_class_are_refused(tmp_path: Path) -> None:
    one = dict.fromkeys(pictures.SPLITS, ("images",))
    data = pictures.Config(image_folder.Config(folder(tmp_path / "found", one)))
    with pytest.raises(DataError, match=r"train has one class, 'images'"):
        Setup(resnet.ResNet(resnet.tiny()), config(data=data), tmp_path)
    assert (
        Setup(resnet.ResNet(resnet.tiny()), config(data=replace(data, num_classes=2)), tmp_path).classes[0] == "images"
    )


def test_a_head_wider_than_the_data_has_classes_by_number(tmp_path: Path) -> None:
    data = pictures.Config(image_folder.Config(folder(tmp_path / "found", ALL)), num_classes=4)
    setup = Setup(resnet.ResNet(resnet.tiny()), config(data=data), tmp_path)
    assert setup.classes == ("cat", "dog", "class 2", "class 3")


def test_a_backbone_that_does_not_fit_is_refused_by_name_before_anything_is_compiled(tmp_path: Path) -> None:
    found = drawn(resnet.ResNet(replace(resnet.tiny(), widths=(8, 24))), 8)
    with pytest.raises(CheckpointError, match=r"backbone/stage2/block0/conv1/kernel.*24"):
        Setup(resnet.ResNet(resnet.tiny()), config(), tmp_path, found)


def test_a_run_starts_from_the_whole_backbone_and_a_head_of_its_own(tmp_path: Path) -> None:
    found = drawn(resnet.ResNet(resnet.tiny()), 8)
    plain = Setup(resnet.ResNet(resnet.tiny()), config(), tmp_path)
    begun = Setup(resnet.ResNet(resnet.tiny()), config(), tmp_path, found)
    trained, running = begun.start()
    assert set(tree.flatten(running)) and all(p.rpartition("/")[2] in ("mean", "var") for p in tree.flatten(running))
    both = tree.merge(trained, running)
    jax.tree.map(np.testing.assert_array_equal, both["backbone"], found.params)
    jax.tree.map(np.testing.assert_array_equal, both["head"], plain.start()[0]["head"])
    first = "backbone/stem/kernel"
    assert not np.array_equal(tree.flatten(both)[first], tree.flatten(plain.start()[0])[first])


def test_positions_are_resized_to_images_of_another_size(tmp_path: Path) -> None:
    found = drawn(vit.ViT(vit.tiny()), 8)
    wider = replace(vit.tiny(), patches=replace(vit.tiny().patches, image_size=(16, 16)))
    setup = Setup(vit.ViT(wider), config(data=pictures.Config(size=16)), tmp_path, found)
    table = setup.start()[0]["backbone"]["embed"]["positions"]
    assert table.shape == (65, 32)
    np.testing.assert_array_equal(table[0], found.params["embed"]["positions"][0])


def test_a_norm_of_tokens_is_not_taken_for_one_of_their_mean(tmp_path: Path) -> None:
    found = drawn(vit.ViT(vit.tiny()), 8)
    found.params["norm_final"]["scale"] = 3 * found.params["norm_final"]["scale"]
    for pool, wanted in (("mean", 3.0), ("mean_norm", 1.0)):
        setup = Setup(vit.ViT(replace(vit.tiny(), pool=pool)), config(), tmp_path, found)  # type: ignore[arg-type]
        np.testing.assert_array_equal(setup.start()[0]["backbone"]["norm_final"]["scale"], np.full(32, wanted))
    own = Pretrained(vit.ViT(replace(vit.tiny(), pool="mean_norm")), found.params, None)
    for pool, wanted in (("mean_norm", 3.0), ("cls", 1.0)):
        setup = Setup(vit.ViT(replace(vit.tiny(), pool=pool)), config(), tmp_path, own)  # type: ignore[arg-type]
        np.testing.assert_array_equal(setup.start()[0]["backbone"]["norm_final"]["scale"], np.full(32, wanted))


@pytest.mark.slow
def test_running_statistics_move_and_are_in_the_checkpoint_that_a_later_run_opens(tmp_path: Path) -> None:
    backbone = resnet.ResNet(resnet.tiny())
    setup = Setup(backbone, config(mix=Mix(), ema_decay=0.5), tmp_path)
    before = tree.flatten(setup.start()[1])
    saved = {"backbone": to_dict(backbone.cfg), "data": to_dict(setup.cfg.data)}
    params = setup.fit(tmp_path, lambda *_: {"nll": 1.0}, saved)
    after = tree.flatten(params)
    assert all(not np.array_equal(after[path], leaf) for path, leaf in before.items())
    stored = vision_models.load(tmp_path)
    running = {path: leaf for path, leaf in tree.flatten(stored.params).items() if f"backbone/{path}" in before}
    for path, leaf in running.items():
        np.testing.assert_array_equal(leaf, after[f"backbone/{path}"])
    assert len(running) == len(before)


def test_views_of_an_image_are_repeated_and_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(stage, "train", lambda *args, **options: asked.update(options) or asked["make_params"]())
    monkeypatch.setattr(image_classifier, "evaluated", lambda done: done)
    setup = Setup(vit.ViT(vit.tiny()), config(repeats=3, mix=Mix()), tmp_path)
    setup.fit(tmp_path, lambda step, params: {}, {})
    assert (asked["batches"].batches.repeats, asked["batches"].mix) == (3, Mix())


def test_drops_of_the_rate_are_given_in_shares_of_the_run() -> None:
    cfg = config(fit=loop.FitConfig(900), schedule="steps", drop_at=(30 / 90, 60 / 90, 80 / 90), learning_rate=0.1)
    rate = schedule.make(image_classifier.rates(cfg))
    close([rate(s) for s in (0, 299, 300, 600, 799, 800)], [0.1, 0.1, 0.01, 1e-3, 1e-3, 1e-4])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"accumulate": 3}, "accumulate"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup": 1.0}, "warmup"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"drop_at": (0.5, 1.0)}, "drop_at"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"measured": 0}, "measured"),
        ({"repeats": 17}, "repeats 17"),
        ({"data": pictures.Config(recipe=views.digits(2))}, "one view"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**changes)


def test_a_run_that_goes_on_opens_nothing_that_is_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checkpoint holds all of it: the model that it started from may be gone, or take long to fetch."""
    cfg = config(init=Init(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="gone does not exist"):
        Setup(resnet.ResNet(resnet.tiny()), cfg, tmp_path / "run")
    monkeypatch.setattr(image_classifier, "resumes", lambda workdir: workdir.name == "run")
    assert Setup(resnet.ResNet(resnet.tiny()), cfg, tmp_path / "run").pretrained is None
