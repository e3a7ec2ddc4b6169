"""Train Faster R-CNN, a two-stage detector, on COCO, on folders of your own, or on drawn scenes.

Paper: Ren et al. 2015, on the feature pyramid of Lin et al. 2017. Idea: a small network proposes boxes that may hold an
object, and a second one looks at each proposal's own crop of the features: it names its class and corrects its edges.

    ./launch.sh local experiments.vision.faster_rcnn_coco --data.source.path coco --init.from models/resnet50
    ./launch.sh local experiments.vision.faster_rcnn_coco --config mine --data.source.path photos --model.num_classes 3
    ./launch.sh local experiments.vision.faster_rcnn_coco --config small --baselines true   # two cores, five minutes

COCO: train2017, val2017 and annotations as they are unpacked. `mine` reads YOLO's folders; other sources are
`--data.source voc` and `--data.source catalogue`. `--init.from` starts from another run, from a folder with
torchvision's weights, or with the backbone of a ResNet: a run of `resnet_imagenet` or `simclr_pretrain`, or a public
one. Its batch norms are frozen, so that the default without `--init.from` does not learn: it needs a pretrained one.

The default is the 1x recipe of detectron2's model zoo: SGD with momentum 0.9, 16 images, learning rate 0.02 divided by
ten after 60 and 80 of 90 thousand steps, weight decay 1e-4, shorter side 800, flips; stem and first stage frozen. Two
differences: one size instead of shorter sides of 640 to 800, and a canvas of 1,344 × 1,344 pixels that holds both
orientations. Expected AP on val2017: 37.9 (its model zoo; 37.0 for torchvision's weights). The paper's VGG-16 has 21.9
on test-dev.
Hardware: this needs GPUs and was not run here.

Measured with `small` (0.9 million parameters, 800 steps, five to six CPU-minutes), seeds 0, 1 and 2: AP 0.642, 0.639
and 0.610, AP50 0.859, 0.857 and 0.830 on 512 test scenes; baselines as in `yolox_coco`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.vision import _detection
from fm_jax import cli
from fm_jax.core.errors import ConfigError
from fm_jax.data.boxes import augment, coco, pipeline, yolo
from fm_jax.data.images.pictures import IMAGENET_MEAN, IMAGENET_STD
from fm_jax.models.vision import faster_rcnn, resnet
from fm_jax.objectives.detection import faster_rcnn as objective
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import detector
from fm_jax.tasks.init import Init
from fm_jax.train import loop, stage

SGD = optimizers.Config(name="sgd", momentum=0.9, weight_decay=1e-4, clip_norm=None)
FIRST = (r"backbone/stem/.*", r"backbone/norm_stem/.*", r"backbone/stage1.*")  # detectron2 freezes these


@dataclass(frozen=True, kw_only=True)
class Config(detector.Config):
    """Everything that decides the numbers of a Faster R-CNN run."""

    model: faster_rcnn.Config
    backbone: resnet.Config
    samples: objective.Config = objective.Config()  # which anchors and proposals are trained on

    def __post_init__(self) -> None:
        """Refuse frozen norms of an untrained backbone: nothing could be learnt."""
        super().__post_init__()
        if self.backbone.norm_frozen and self.init.from_ is None:
            raise ConfigError(
                "the batch norms of a random backbone are frozen; set init.from to a ResNet, or backbone.norm_frozen "
                "false and frozen none"
            )


def config() -> Config:
    """Return detectron2's 1x recipe for ResNet-50 with a feature pyramid, from the weights in models/resnet50."""
    model, backbone = faster_rcnn.resnet50_fpn(80)
    data = pipeline.Config(
        coco.Config(Path("coco")),
        (1344, 1344),
        "short",
        fill=116,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        recipe=augment.flips(),
    )
    return Config(
        model=model,
        backbone=replace(backbone, dtype="bfloat16"),
        data=data,
        fit=loop.FitConfig(90_000, log_every=50, eval_every=10_000, save_every=2_500),
        learning_rate=0.02,
        batch_size=16,
        schedule="steps",
        drop_at=(60 / 90, 80 / 90),
        warmup=1 / 90,
        optimizer=SGD,
        frozen=FIRST,
        init=Init(Path("models/resnet50")),
        workers=16,
    )


def mine() -> Config:
    """Return the recipe for a folder in YOLO's form: 20 epochs of 1,000 images; for others set fit.num_steps."""
    cfg = config()
    source = yolo.Config(Path("photos"))
    fit = stage.epochs(20, 1000, 4)
    return replace(cfg, data=replace(cfg.data, source=source), fit=fit, learning_rate=0.005, batch_size=4, workers=4)


def small() -> Config:
    """Return the preset for two cores: 0.9 million parameters on scenes of 64 × 64 pixels with one to three shapes."""
    model, backbone = faster_rcnn.scenes(4)
    return Config(
        model=model,
        backbone=backbone,
        samples=objective.Config(anchors=64, proposals=64),
        data=_detection.drawn(64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        fit=loop.FitConfig(800, log_every=50, eval_every=400),
        learning_rate=1e-3,
        batch_size=16,
        warmup=0.05,
        optimizer=optimizers.Config(weight_decay=1e-2),
    )


def debug() -> Config:
    """Return two steps of a tiny network, the stem frozen."""
    cfg, (model, backbone) = small(), faster_rcnn.tiny()
    return replace(
        cfg,
        model=replace(model, num_classes=4),
        backbone=backbone,
        samples=objective.Config(anchors=16, proposals=16),
        data=_detection.few(cfg.data),
        fit=loop.FitConfig(2, log_every=1, save_every=1),
        batch_size=8,
        warmup=0.0,
        frozen=("backbone/stem/.*",),
        measured=4,
    )


CONFIGS: dict[str, Callable[[], Config]] = {"default": config, "mine": mine, "small": small, "debug": debug}


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json."""
    model = faster_rcnn.FasterRCNN(cfg.model, resnet.ResNet(cfg.backbone))
    return detector.run(model, objective.faster_rcnn(model.apply, cfg.samples), cfg, workdir)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
