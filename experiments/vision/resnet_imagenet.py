"""Train ResNets on ImageNet, CIFAR-10 or the digits, and compare them with plain networks of the same depth.

Paper: He et al. 2016. Idea: each block learns a residual that is added to its input, which makes deep networks easier
to train. Without these shortcuts, a deeper network ends at a higher training loss than a shallower one.

    ./launch.sh local experiments.vision.resnet_imagenet --data.source.download true      # ResNet-50
    ./launch.sh local experiments.vision.resnet_imagenet --config modern --data.source folder --data.source.path photos
    ./launch.sh local experiments.vision.resnet_imagenet --config cifar10 --data.source.download true  # ResNet-20, GPU
    ./launch.sh local experiments.vision.resnet_imagenet --config demo --workdir runs/digits       # two cores, a minute
    ./launch.sh local experiments.vision.resnet_imagenet --config plain44    # beside plain20, residual20 and residual44

The default is the paper's SGD (momentum 0.9, weight decay 1e-4, batch size 256, learning rate 0.1) in the form of Goyal
et al. 2017 (section 5.1): 90 epochs, the learning rate divided by ten after 30, 60 and 80, no weight decay on
normalisation parameters, random crops and flips. Expected top-1 error of ResNet-50: 23.60 ± 0.12 % (Goyal et al., table
1), 23.87 % (torchvision's first weights, its documentation), 22.85 % with ten crops (the paper, table 3). `modern` has
a cosine schedule, five epochs of warm-up, label smoothing 0.1 and 120 epochs. These are some of the changes of He et
al. 2019; their 20.71 % (abstract) also needs a changed network, distillation and mixup. `cifar10` is the paper's
ResNet-20 (8.75 % error, table 6; trained there on all 50,000 images).
Hardware: these three need GPUs and were not run here. `--init.from RUN` starts from a self-supervised backbone
(`simclr_pretrain`), `--init.from OWNER/NAME` from a public one.

Measured with `demo` (78 thousand parameters, 600 steps, 24 to 31 CPU-seconds, seeds 0 to 2): 447, 449 and 450 of the
450 test images are right. Baselines: RBF-SVM on the pixels 99.6 %, logistic regression 97.1 % (its regularisation
strength chosen on the validation images).

Measured with the four deep presets (generated scenes of six shapes, 640 steps, seeds 0 to 2; 110 to 130 CPU-seconds for
20 layers, 190 to 250 for 44): loss on the training images, and accuracy on 1,024 test images.

                   loss                     accuracy
    plain20        0.058  0.043  0.083      0.939  0.960  0.952
    plain44        1.726  1.787  1.785      0.192  0.156  0.183
    residual20     0.037  0.109  0.048      0.958  0.909  0.934
    residual44     0.017  0.432  0.035      0.959  0.791  0.960

Without shortcuts, 20 layers learn well, but 44 layers stay at chance (loss 1.79, accuracy 0.167). With shortcuts, 44
layers end at a lower loss than 20 in two runs of three, and at a higher one in the third.

`results.json` has top-1, top-5, nll and calibration error on training, validation and test images. `confusion.png` is
the confusion matrix of the test images. `metrics.jsonl` has the images per second.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fm_jax import cli
from fm_jax.data.images import pictures, scenes, views
from fm_jax.models.vision import resnet
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import image_classifier
from fm_jax.train import loop, stage

SGD = optimizers.Config(name="sgd", momentum=0.9, weight_decay=1e-4, clip_norm=None)


@dataclass(frozen=True, kw_only=True)
class Config(image_classifier.Config):
    """Everything that decides the numbers of a ResNet run."""

    backbone: resnet.Config


def config() -> Config:
    """Return ResNet-50 with the paper's SGD for 90 epochs."""
    return Config(
        backbone=replace(resnet.resnet50(), dtype="bfloat16"),
        data=pictures.imagenet(),
        fit=stage.epochs(90, pictures.IMAGENET_TRAIN, 256),
        learning_rate=0.1,
        batch_size=256,
        schedule="steps",
        drop_at=(30 / 90, 60 / 90, 80 / 90),
        optimizer=SGD,
        workers=16,
    )


def modern() -> Config:
    """Return ResNet-50 with a cosine schedule, warm-up, label smoothing and larger batches, for 120 epochs."""
    return replace(
        config(),
        fit=stage.epochs(120, pictures.IMAGENET_TRAIN, 1024),
        learning_rate=0.4,
        batch_size=1024,
        schedule="cosine",
        warmup=5 / 120,
        drop_at=(),
        label_smoothing=0.1,
    )


def cifar10() -> Config:
    """Return ResNet-20 on CIFAR-10 (section 4.2): 64,000 steps, learning rate divided by ten at 32,000 and 48,000."""
    return Config(
        backbone=resnet.resnet20(),
        data=pictures.cifar(),
        fit=loop.FitConfig(64_000, log_every=50, eval_every=3_200, save_every=3_200),
        learning_rate=0.1,
        batch_size=128,
        schedule="steps",
        drop_at=(0.5, 0.75),
        optimizer=SGD,
        workers=8,
    )


def demo() -> Config:
    """Return the preset for two cores: a ResNet-8 of 78 thousand parameters on the built-in digits."""
    return Config(
        backbone=resnet.cifar(8),
        data=pictures.Config(recipe=views.digits()),
        fit=loop.FitConfig(600, log_every=20, eval_every=200),
        learning_rate=3e-3,
        batch_size=64,
        warmup=0.05,
        optimizer=optimizers.Config(weight_decay=1e-2),
    )


def deep(layers: int, shortcut: Literal["pad", "none"]) -> Config:
    """Return a network of 8 channels, with or without shortcuts, on generated scenes of 24 × 24 pixels."""
    return Config(
        backbone=resnet.cifar(layers, 8, shortcut),
        data=pictures.Config(scenes.Config(), size=24),
        fit=loop.FitConfig(640, log_every=20),
        learning_rate=0.05,
        batch_size=64,
        warmup=0.05,
        optimizer=SGD,
    )


def debug() -> Config:
    """Return two steps of a tiny network."""
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    return replace(demo(), backbone=resnet.tiny(), fit=fit, batch_size=16, measured=16)


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "modern": modern,
    "cifar10": cifar10,
    "demo": demo,
    "plain20": partial(deep, 20, "none"),
    "plain44": partial(deep, 44, "none"),
    "residual20": partial(deep, 20, "pad"),
    "residual44": partial(deep, 44, "pad"),
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json."""
    return image_classifier.run(resnet.ResNet(cfg.backbone), cfg, workdir)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
