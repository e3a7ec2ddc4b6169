"""Finetune a pretrained Vision Transformer: a masked autoencoder's encoder or a public model, at any image size.

Papers: He et al. 2022, appendix A.2 (finetuning after masked pretraining), Dosovitskiy et al. 2021 (a higher
resolution: position embeddings are interpolated), Clark et al. 2020 (layer-wise learning-rate decay). Idea: a
pretrained encoder with a new head needs fewer labels and steps than a model trained from scratch.

    ./launch.sh local experiments.vision.vit_finetune --init.from runs/mae --data.source folder --data.source.path pets
    ./launch.sh local experiments.vision.vit_finetune --init.from google/vit-base-patch16-224 --pool cls --data.size 384
    ./launch.sh local experiments.vision.vit_finetune --config demo --init.from runs/mae_demo      # two cores, a minute

The architecture is that of `--init.from`. The head is new, and so is the norm before it, which reads the mean over the
patches (`--pool`, as in the paper; `transformers` can open an exported run only with `--pool cls`). Fixed position
embeddings become trainable. The default is the authors' recipe for ViT-B (FINETUNE.md of facebookresearch/mae; table 9
of the paper has a base learning rate of 1e-3 and layer decay 0.75): AdamW 0.9/0.999, learning rate 5e-4 · batch size /
256 = 2e-3 at batch size 1024, weight decay 0.05, layer decay 0.65, 100 epochs, five of them warm-up, cosine schedule;
RandAugment (2, 9), random erasing 0.25, mixup 0.8, CutMix 1.0, label smoothing 0.1, drop path 0.1.
Expected after 1600 epochs of masked pretraining: 83.6 % top-1 on ImageNet (four seeds: 83.57 ± 0.08). For ViT-L and
ViT-H the authors use 1e-3 · batch size / 256, layer decay 0.75, 50 epochs and drop path 0.2 and 0.3, and report 85.9
and 86.9 %.
Hardware: several GPUs; not run here.

Measured on the digits with `demo` (400 steps, 20 to 35 CPU-seconds) after `mae_pretrain --config demo`, seeds 0 to 2:
accuracy on the 450 test images. The learning rate was chosen on the validation images, from 1e-3 and 3e-3, for
`scratch` also from 5e-3 and 1e-2.

    finetuned after 50 % masking, learning rate 3e-3, layer decay 0.75                   0.993  0.991  0.978
    `--method scratch`, learning rate 3e-3, no layer decay                               0.949  0.956  0.967
    the same with 5e-3, which is worse on the validation images                          0.956  0.978  0.976

With learning rate 1e-3 the accuracy is 0.978, 0.976 and 0.978 after 75 % masking, and 0.982, 0.976 and 0.976 after 50
%. With few labels (`linear_probe --pool mean --learning_rate 3e-3`, six draws) the same network gives, for 1, 5 and 20
labels per class:

    finetuned             0.42  0.68  0.88
    from scratch          0.24  0.48  0.71
    frozen features       0.61  0.81  0.89
    raw pixels            0.62  0.83  0.94
    untrained features    0.20  0.45  0.66
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fm_jax import cli
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.data.images import pictures, views
from fm_jax.data.images.mixup import Mix
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import vit
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import image_classifier
from fm_jax.tasks import vision as vision_models
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import loop, stage


@dataclass(frozen=True, kw_only=True)
class Config(image_classifier.Config):
    """Everything that decides the numbers of a finetuning run."""

    init: Init = Init(Path("runs/mae_pretrain"))
    method: Literal["finetune", "scratch"] = "finetune"  # scratch: only the architecture of init.from is used
    pool: vit.Pool = "mean_norm"
    drop_path: float = 0.1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # computation dtype


def config() -> Config:
    """Return the authors' recipe for ViT-B."""
    return Config(
        data=replace(pictures.imagenet(), recipe=views.finetune()),
        fit=stage.epochs(100, pictures.IMAGENET_TRAIN, 1024),
        learning_rate=2e-3,
        batch_size=1024,
        warmup=0.05,
        optimizer=optimizers.Config(weight_decay=0.05, layer_decay=0.65, clip_norm=None),
        label_smoothing=0.1,
        mix=Mix(),
        dtype="bfloat16",
        workers=16,
    )


def demo() -> Config:
    """Return the preset for two cores: finetune the encoder of `mae_pretrain --config demo` on the digits."""
    return Config(
        init=Init(Path("runs/mae_demo")),
        data=pictures.Config(recipe=replace(views.digits(), affine=0.5)),
        fit=loop.FitConfig(400, log_every=20, eval_every=200),
        learning_rate=3e-3,
        batch_size=64,
        warmup=0.1,
        optimizer=optimizers.Config(weight_decay=0.05, layer_decay=0.75),
        drop_path=0.0,
    )


def debug() -> Config:
    """Return two steps on the encoder of `mae_pretrain --config debug --workdir runs/mae_debug`."""
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    return replace(
        demo(), init=Init(Path("runs/mae_debug")), fit=fit, batch_size=16, measured=16, warmup=0.0, mix=Mix()
    )


CONFIGS: dict[str, Callable[[], Config]] = {"default": config, "demo": demo, "debug": debug}


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Finetune, evaluate, and return the metrics, also written to results.json."""
    pretrained = vision_models.load(cfg.init.source, **cfg.init.options, shapes=resumes(workdir))
    backbone = vit.ViT(adapted(pretrained, cfg))
    saved = to_dict(cfg) | {"backbone": to_dict(backbone.cfg)}
    if cfg.method == "scratch":
        return image_classifier.run(backbone, replace(cfg, init=Init()), workdir, saved=saved)
    return image_classifier.run(backbone, cfg, workdir, pretrained, saved=saved)


def adapted(pretrained: Pretrained, cfg: Config) -> vit.Config:
    """Return the pretrained model's config, changed to the run's image size, pooling, drop path and dtype.

    Raises:
        ConfigError: the model is not a Vision Transformer, or its patches do not divide the images.
    """
    if not isinstance(pretrained.module, vit.ViT):
        kind = type(pretrained.module).__name__
        raise ConfigError(f"init.from {cfg.init.from_} has a model of class {kind}, not a Vision Transformer")
    own, size = pretrained.module.cfg, cfg.data.size
    patches = replace(own.patches, image_size=(size, size), positions="learned")
    return replace(own, patches=patches, pool=cfg.pool, drop_path=cfg.drop_path, dtype=cfg.dtype)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
