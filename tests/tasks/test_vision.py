"""Opening the backbone that a run or a public folder holds, whatever stood on it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint.store import Store
from fm_jax.core import statistics, tree
from fm_jax.core.config import apply_overrides, to_dict
from fm_jax.core.errors import CheckpointError
from fm_jax.data.images import pictures, views
from fm_jax.hub import preprocessing
from fm_jax.hub import pretrained as public
from fm_jax.hub.preprocessing import Preprocessing
from fm_jax.models.language import decoder
from fm_jax.models.vision import efficientnet, resnet, vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.tasks import vision as vision_models

DATA = pictures.Config(size=12, recipe=views.digits(2))
NETS: list[Any] = [
    resnet.ResNet(resnet.tiny()),
    efficientnet.EfficientNet(efficientnet.tiny()),
    vit.ViT(vit.tiny()),
]


@dataclass(frozen=True)
class Shown:
    data: pictures.Config


def drawn(module: Any, size: int = 8) -> Any:
    image = np.zeros((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(lambda: meta.unbox(module.init(jax.random.key(0), image)["params"]))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)


def leave_run(workdir: Path, module: Any, params: Any, **metrics: float) -> None:
    """Leave what a pretraining leaves: running statistics apart, and two checkpoints, the first the better one."""
    trained, running = statistics.split(params)
    about = {"config": {"data": to_dict(DATA)}, "model": models.describe(module)}
    with Store(workdir / "checkpoints", metric="validation/loss", meta=about) as store:
        for step in (1, 2):
            state = {"params": jax.tree.map(lambda leaf: leaf * step, trained), "frozen": running}  # noqa: B023
            store.save(step, state, {}, {name: value * step for name, value in metrics.items()})


@pytest.mark.parametrize("net", NETS, ids=lambda net: type(net).__name__)
@pytest.mark.parametrize("head", [SimCLR, ImageClassifier])
def test_a_run_gives_its_backbone_with_running_statistics_and_no_head(net: Any, head: Any, tmp_path: Path) -> None:
    module = head(net, 5)
    params = drawn(module)
    leave_run(tmp_path, module, params, **{"validation/loss": 1.0})
    found = vision_models.load(tmp_path)
    assert found.module == net
    have, want = tree.flatten(found.params), tree.flatten(params["backbone"])  # of step 1, the best
    assert have.keys() == want.keys()
    assert all(np.array_equal(have[path], want[path]) for path in want)
    image = np.ones((2, 8, 8, 3), np.float32)
    assert found.module.apply({"params": found.params}, image).ndim == 2


def test_without_a_metric_it_is_the_last_checkpoint_and_the_dtype_is_ones_own(tmp_path: Path) -> None:
    params = drawn(SimCLR(NETS[0], 8))
    leave_run(tmp_path, SimCLR(NETS[0], 8), params)
    found = vision_models.load(tmp_path, dtype="bfloat16")
    np.testing.assert_array_equal(found.params["stem"]["kernel"], 2 * params["backbone"]["stem"]["kernel"])
    assert found.module == resnet.ResNet(replace(resnet.tiny(), dtype="bfloat16"))


def test_a_run_says_how_it_saw_its_images_and_a_folder_does_not(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", SimCLR(NETS[0], 8), drawn(SimCLR(NETS[0], 8)))
    assert vision_models.images(tmp_path / "run") == DATA
    (tmp_path / "folder").mkdir()
    assert vision_models.images(tmp_path / "folder") is None


def test_a_public_folder_gives_its_backbone_without_the_head(tmp_path: Path) -> None:
    net = resnet.ResNet(resnet.Config((1, 1), (8, 16), "basic", stem_width=8))
    model = ImageClassifier(net, 3)
    params = drawn(model, 32)
    public.save(tmp_path / "net", model, params)
    found = vision_models.load(tmp_path / "net")
    assert found.module == net
    config = tmp_path / "net" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mystery": 1}))
    with pytest.raises(CheckpointError, match=r"mystery \(1\) is unknown"):
        vision_models.load(tmp_path / "net")
    assert vision_models.load(tmp_path / "net", ignore=iter(["mystery"])).module == net
    have = tree.flatten(found.params)
    assert all(np.array_equal(have[path], leaf) for path, leaf in tree.flatten(params["backbone"]).items())


def test_images_that_are_shown_otherwise_than_they_were_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = resnet.ResNet(resnet.Config((1, 1), (8, 16), "basic", stem_width=8))
    seen = Preprocessing(28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.875, "bicubic", stretch=True)
    public.save(tmp_path / "net", net, drawn(net, 32), preprocessing=seen)
    found = vision_models.load(tmp_path / "net")
    assert found.preprocessing == seen
    text = vision_models.remind(found, pictures.Config(size=64))
    assert text.endswith(
        "--data.mean 0.1,0.2,0.3 --data.std 0.4,0.5,0.6 --data.recipe.interpolation bicubic --data.center_crop 0.875 "
        "--data.stretch true"
    )
    assert text in caplog.text
    options = text.partition("add: ")[2].split()
    alike = apply_overrides(Shown(pictures.Config(size=64)), options).data
    assert vision_models.remind(found, alike) == ""
    assert vision_models.as_trained(found, pictures.Config()) == replace(alike, size=28)
    chosen = pictures.Config(size=64, std=(0.1,) * 3)
    assert vision_models.as_trained(found, chosen) == replace(alike, std=(0.1,) * 3)
    leave_run(tmp_path / "run", SimCLR(NETS[0], 8), drawn(SimCLR(NETS[0], 8)))
    assert vision_models.remind(vision_models.load(tmp_path / "run"), DATA) == ""


def test_a_share_that_a_folder_holds_in_whole_pixels_is_no_difference(tmp_path: Path) -> None:
    net, shown = resnet.ResNet(resnet.Config((1, 1), (8, 16), "basic", stem_width=8)), pictures.Config(size=240)
    shown = replace(shown, center_crop=0.875)
    public.save(tmp_path / "net", net, drawn(net, 32), preprocessing=preprocessing.of(shown))
    found = vision_models.load(tmp_path / "net")
    assert vision_models.remind(found, shown) == ""
    assert "--data.center_crop 0.8759" in vision_models.remind(found, replace(shown, center_crop=0.9))


def test_what_is_not_there_or_reads_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        vision_models.load(tmp_path / "nothing")
    leave_run(tmp_path / "text", decoder.Decoder(decoder.tiny()), {"embed": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match="text trained a Decoder, which does not read images"):
        vision_models.load(tmp_path / "text")


def test_a_run_without_a_head_is_its_own_backbone(tmp_path: Path) -> None:
    params = drawn(NETS[0])
    leave_run(tmp_path, NETS[0], params)
    found = vision_models.load(tmp_path)
    assert found.module == NETS[0] and tree.flatten(found.params).keys() == tree.flatten(params).keys()
