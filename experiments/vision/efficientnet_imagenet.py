"""Train EfficientNet B0 to B7 on ImageNet: depth, width and image size scaled together.

Paper: Tan & Le 2019. Idea: B0 was found by architecture search. The larger models scale its depth, width and image size
together, each by a fixed power of one number. This gives more accuracy than scaling one of them alone.

    ./launch.sh local experiments.vision.efficientnet_imagenet --data.source.download true                       # B0
    ./launch.sh local experiments.vision.efficientnet_imagenet --config b3 --data.source folder --data.source.path pets
    ./launch.sh local experiments.vision.efficientnet_imagenet --config demo --workdir runs/digits  # two cores, minutes
    ./launch.sh local experiments.vision.efficientnet_imagenet --init.from google/efficientnet-b0 --data.source folder …

The defaults are the paper's (section 5.2): RMSProp with decay 0.9 and momentum 0.9, weight decay 1e-5, learning rate
0.256 multiplied by 0.97 every 2.4 epochs, dropout 0.2 (0.5 for B7), stochastic depth 0.2. The paper does not give the
rest, which follows the authors' code (tensorflow/tpu, main.py and utils.py): learning rate 0.016 per 256 images, so a
batch size of 4096; 350 epochs, five of them warm-up; label smoothing 0.1; EMA 0.9999. Two differences: RandAugment (2
operations at magnitude 9) replaces the AutoAugment policy, which needs a search; and the EMA averages only the trained
parameters, not the running statistics of batch normalisation (momentum 0.99), which the authors average too.
Hardware: a pod; not run here. Expected top-1 (table 2, last version on arXiv): B0 77.1 %, B1 79.1, B2 80.1, B3 81.6, B4
82.9, B5 83.6, B6 84.0, B7 84.3.

Measured with `demo` (400 steps, 36 CPU-seconds and at most as many for compilation, seeds 0 to 2): 98.7 ± 1.1 %
accuracy on the 450 test images (RBF-SVM on the pixels 99.6 %, logistic regression 97.1 %). So narrow a network depends
on its initialisation: with fan-out scaling, as here, it learns at once; with a normal of standard deviation 0.02 it
learnt nothing in 200 steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fm_jax import cli
from fm_jax.data.images import pictures, views
from fm_jax.models.vision import efficientnet
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import image_classifier
from fm_jax.train import loop, stage

RMSPROP = optimizers.Config(name="rmsprop", b2=0.9, momentum=0.9, eps=1e-3, weight_decay=1e-5, clip_norm=None)


@dataclass(frozen=True, kw_only=True)
class Config(image_classifier.Config):
    """Everything that decides the numbers of an EfficientNet run."""

    backbone: efficientnet.Config


def config(number: int = 0) -> Config:
    """Return the paper's recipe for B0 to B7, each with its own image size."""
    net = replace(efficientnet.efficientnet(number), dtype="bfloat16")
    data = pictures.imagenet(net.image_size)
    return Config(
        backbone=net,
        data=replace(data, recipe=replace(views.imagenet(), layers=2, magnitude=9.0, interpolation="bicubic")),
        fit=stage.epochs(350, pictures.IMAGENET_TRAIN, 4096),
        learning_rate=0.256,
        batch_size=4096,
        schedule="steps",
        warmup=5 / 350,
        drop=0.97,
        drop_every=2.4 / 350,
        optimizer=RMSPROP,
        label_smoothing=0.1,
        dropout=efficientnet.SCALES[number].dropout,
        ema_decay=0.9999,
        workers=32,
    )


def demo() -> Config:
    """Return the preset for two cores: a quarter of B0's width and a tenth of its depth, digits of 32 × 32 pixels."""
    return Config(
        backbone=efficientnet.Config(0.25, 0.1, 32, drop_path=0.0, norm_momentum=0.9),
        data=pictures.Config(size=32, recipe=views.digits()),
        fit=loop.FitConfig(400, log_every=20, eval_every=200),
        learning_rate=3e-3,
        batch_size=64,
        warmup=0.05,
        optimizer=optimizers.Config(weight_decay=1e-2),
    )


def debug() -> Config:
    """Return two steps of a tiny network with the paper's optimiser and an EMA."""
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    small = replace(demo(), backbone=efficientnet.tiny(), data=pictures.Config(size=16, recipe=views.digits()), fit=fit)
    rule = {"schedule": "steps", "drop_every": 0.5, "optimizer": RMSPROP, "ema_decay": 0.99, "dropout": 0.2}
    return replace(small, batch_size=16, measured=16, warmup=0.0, **rule)  # type: ignore[arg-type]


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    **{f"b{number}": partial(config, number) for number in range(len(efficientnet.SCALES))},
    "demo": demo,
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json."""
    return image_classifier.run(efficientnet.EfficientNet(cfg.backbone), cfg, workdir)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
