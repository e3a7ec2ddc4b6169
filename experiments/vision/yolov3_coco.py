"""Train YOLOv3, a one-stage detector with anchor boxes, on COCO, on folders of your own, or on drawn scenes.

Paper: Redmon & Farhadi 2018. Idea: every cell of three feature maps predicts one box for each of three anchors, whether
an object is there, and its classes. An object belongs to the one anchor whose shape is most like its own.

    ./launch.sh local experiments.vision.yolov3_coco --data.source.path coco                         # GPUs
    ./launch.sh local experiments.vision.yolov3_coco --config mine --data.source.path photos --model.num_classes 3
    ./launch.sh local experiments.vision.yolov3_coco --config small --baselines true        # two cores, five minutes

COCO: train2017, val2017 and annotations as they are unpacked. `mine` reads YOLO's folders (data.yaml or classes.txt);
other sources are `--data.source voc` and `--data.source catalogue`. `--init.from` starts from another run, or from
Darknet's own .cfg and .weights.

The default is that of Darknet's yolov3.cfg: SGD with momentum 0.9, 64 images, learning rate 1e-3 divided by ten after
400 and 450 of 500.2 thousand steps, weight decay 5e-4, 1,000 steps of warm-up (linear here, of the fourth power there),
sides of 320 to 608 pixels, shifts and scales by up to 0.3, and colours. Expected AP50 on test-dev (the paper, table 3,
at 320, 416 and 608 pixels): 51.5, 55.3 and 57.9; AP 28.2, 31.0 and 33.0.
Hardware: this needs GPUs and was not run here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.vision import _detection
from fm_jax import cli
from fm_jax.data.boxes import coco, pipeline, yolo
from fm_jax.data.boxes.augment import Recipe
from fm_jax.models.vision import yolov3
from fm_jax.objectives.detection import yolov3 as objective
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import detector
from fm_jax.train import loop, stage

SGD = optimizers.Config(name="sgd", momentum=0.9, weight_decay=5e-4, clip_norm=None)


@dataclass(frozen=True, kw_only=True)
class Config(detector.Config):
    """Everything that decides the numbers of a YOLOv3 run."""

    model: yolov3.Config
    ignore: float = 0.7  # IoU with an object above which a candidate is not told that it shows none


def config() -> Config:
    """Return Darknet's recipe on COCO 2017."""
    sizes = tuple(range(320, 609, 32))
    recipe = Recipe(scale=(0.7, 1.3), shift=0.3, hsv=(0.1, 0.33, 0.33), flip=0.5, sizes=sizes)
    return Config(
        model=replace(yolov3.yolov3(), dtype="bfloat16"),
        data=pipeline.Config(coco.Config(Path("coco")), (416, 416), fill=128, recipe=recipe),
        fit=loop.FitConfig(500_200, log_every=50, eval_every=25_000, save_every=5_000),
        learning_rate=1e-3,
        batch_size=64,
        schedule="steps",
        drop_at=(400_000 / 500_200, 450_000 / 500_200),
        warmup=1_000 / 500_200,
        optimizer=SGD,
        workers=32,
    )


def mine() -> Config:
    """Return the recipe for a folder in YOLO's form: 50 epochs of 1,000 images; for others set fit.num_steps."""
    cfg = config()
    data = replace(cfg.data, source=yolo.Config(Path("photos")))
    return replace(cfg, data=data, fit=stage.epochs(50, 1000, 16), batch_size=16, warmup=0.05, workers=4)


def small() -> Config:
    """Return the preset for two cores: 0.9 million parameters on scenes of 64 × 64 pixels with one to three shapes."""
    anchors = (((24.0, 24.0), (32.0, 32.0)), ((13.0, 13.0), (18.0, 18.0)))
    return Config(
        model=yolov3.Config(
            (16, 32, 64, 128), (1, 1, 2), (128, 64), anchors, 4, image_size=(64, 64), norm_momentum=0.9
        ),
        data=_detection.drawn(64),
        fit=loop.FitConfig(1000, log_every=50, eval_every=500),
        learning_rate=2e-3,
        batch_size=16,
        warmup=0.05,
        optimizer=optimizers.Config(weight_decay=1e-2),
    )


def debug() -> Config:
    """Return two steps of a tiny network."""
    cfg = small()
    return replace(
        cfg,
        model=yolov3.tiny(),
        data=_detection.few(cfg.data),
        fit=loop.FitConfig(2, log_every=1, save_every=1),
        batch_size=8,
        warmup=0.0,
        measured=4,
    )


CONFIGS: dict[str, Callable[[], Config]] = {"default": config, "mine": mine, "small": small, "debug": debug}


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json."""
    model = yolov3.YOLOv3(cfg.model)
    form = cfg.model
    loss = objective.yolov3(model.apply, strides=form.strides, anchors=form.anchors, ignore=cfg.ignore)
    return detector.run(model, loss, cfg, workdir)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
