"""Train YOLOX, a one-stage detector without anchor boxes, on COCO, on folders of your own, or on drawn scenes.

Paper: Ge et al. 2021. Idea: every cell of three feature maps predicts one box. Which cells answer for an object is not
fixed by overlaps of anchor boxes but chosen anew in every step: those whose predictions fit it best (SimOTA).

    ./launch.sh local experiments.vision.yolox_coco --data.source.path coco             # YOLOX-s, on GPUs
    ./launch.sh local experiments.vision.yolox_coco --config tiny --data.source.path coco
    ./launch.sh local experiments.vision.yolox_coco --config mine --data.source.path photos --model.num_classes 3
    ./launch.sh local experiments.vision.yolox_coco --config small --baselines true       # two cores, five minutes

COCO: train2017, val2017 and annotations as they are unpacked. `mine` reads YOLO's folders (data.yaml or classes.txt,
images and labels); other sources are `--data.source voc` and `--data.source catalogue`. `--init.from` starts from
another run, or from a folder with YOLOX's public weights saved as safetensors. Then
`experiments.vision.detect` draws what a run finds on photographs.

The default is the recipe of the authors' code (yolox_base.py): SGD with Nesterov momentum 0.9, learning rate 0.01 for
64 images, weight decay 5e-4 on kernels, 300 epochs, cosine to 5 %, EMA 0.9998; mosaic, mixup, turns, HSV and flips, of
which the strong ones end 15 epochs before the end, when an L1 term begins; sides of 480 to 800 pixels. Three
differences: the warm-up of 5 epochs is linear, not quadratic, the learning rate is constant nowhere, and the EMA does
not average the batch norms' running statistics. Expected AP on val2017 (the
authors' README): nano 25.8 and tiny 32.8 at 416 pixels, s 40.5, m 46.9, l 49.7, x 51.1 at 640.
Hardware: these need GPUs and were not run here.

Measured with `small` (2.2 million parameters, 1,000 steps, three to five CPU-minutes), seeds 0, 1 and 2: AP 0.704,
0.682 and 0.653, AP50 0.896, 0.881 and 0.847 on 512 test scenes. Baselines: blobs of colour 0.459 and 0.610, each
class's mean box 0.000 and 0.002.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.vision import _detection
from fm_jax import cli
from fm_jax.core.errors import ConfigError
from fm_jax.data.boxes import augment, coco, pipeline, yolo
from fm_jax.models.vision import yolox
from fm_jax.objectives.detection import yolox as objective
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import detector
from fm_jax.train import loop, stage

SGD = optimizers.Config(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, clip_norm=None)


@dataclass(frozen=True, kw_only=True)
class Config(detector.Config):
    """Everything that decides the numbers of a YOLOX run."""

    model: yolox.Config
    closing: float = 0.0  # share of the steps, at the end, without strong augmentation and with an L1 term

    def __post_init__(self) -> None:
        """Check that the end is a share, and said once."""
        super().__post_init__()
        if not 0 <= self.closing <= 1:
            raise ConfigError(f"closing must be a share of the steps, 0 to 1, not {self.closing}")
        if self.closing and self.data.recipe.close:
            raise ConfigError("data.recipe.close must be 0 beside closing, which says when strong augmentation ends")


def config(net: Callable[..., yolox.Config] = yolox.yolox_s, side: int = 640) -> Config:
    """Return the authors' recipe on COCO 2017; nano and tiny have smaller images and weaker augmentation."""
    weak = side < 640
    reach = range(-5, 6)
    recipe = augment.yolox(sizes=tuple(side + 32 * step for step in reach), small=weak)
    return Config(
        model=replace(net(), dtype="bfloat16"),
        data=pipeline.Config(coco.Config(Path("coco")), (side, side), mean=yolox.MEAN, std=yolox.STD, recipe=recipe),
        fit=stage.epochs(300, _detection.COCO_TRAIN, 64),
        learning_rate=0.01,
        batch_size=64,
        warmup=5 / 300,
        final_ratio=0.05,
        optimizer=SGD,
        ema_decay=0.9998,
        closing=15 / 300,
        workers=32,
    )


def mine() -> Config:
    """Return YOLOX-s for a folder in YOLO's form: 50 epochs of 1,000 images; for others set fit.num_steps."""
    cfg = config()
    source = yolo.Config(Path("photos"))
    return replace(
        cfg,
        data=replace(cfg.data, source=source),
        fit=stage.epochs(50, 1000, 16),
        learning_rate=0.01 / 4,
        batch_size=16,
        workers=4,
    )


def small() -> Config:
    """Return the preset for two cores: 2.2 million parameters on scenes of 64 × 64 pixels with one to three shapes."""
    data = _detection.drawn(64, mean=yolox.MEAN, std=yolox.STD)
    return Config(
        model=yolox.Config(num_classes=4, width=16, norm_momentum=0.9),
        data=data,
        fit=loop.FitConfig(1000, log_every=50, eval_every=500),
        learning_rate=2e-3,
        batch_size=16,
        warmup=0.05,
        optimizer=optimizers.Config(weight_decay=1e-2),
        ema_decay=0.99,
        closing=1.0,
    )


def debug() -> Config:
    """Return two steps of a tiny network with mosaic, mixup, two sizes and an EMA."""
    cfg = small()
    recipe = augment.yolox(sizes=(32, 64))
    return replace(
        cfg,
        model=replace(yolox.tiny(), num_classes=4),
        data=replace(_detection.few(cfg.data), recipe=replace(recipe, every=1)),
        fit=loop.FitConfig(2, log_every=1, save_every=1),
        batch_size=8,
        warmup=0.0,
        closing=0.5,
        measured=4,
    )


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "nano": partial(config, yolox.yolox_nano, 416),
    "tiny": partial(config, yolox.yolox_tiny, 416),
    "m": partial(config, yolox.yolox_m),
    "l": partial(config, yolox.yolox_l),
    "x": partial(config, yolox.yolox_x),
    "mine": mine,
    "small": small,
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json."""
    model = yolox.YOLOX(cfg.model)
    closed = round((1 - cfg.closing) * cfg.fit.num_steps)
    loss = objective.yolox(model.apply, l1_from=closed if cfg.closing else None)
    recipe = replace(cfg.data.recipe, close=max(closed, 1)) if cfg.closing else cfg.data.recipe
    return detector.run(model, loss, replace(cfg, data=replace(cfg.data, recipe=recipe), closing=0.0), workdir)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
