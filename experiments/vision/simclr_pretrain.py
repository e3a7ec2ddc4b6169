"""SimCLR contrastive pretraining: a network learns from unlabelled images to match two views of the same image.

Paper: Chen et al. 2020. Idea: each image is cropped, colour-jittered and blurred twice. A ResNet with a small
projection head must find each view's partner among all other views of the batch. Since colour and position differ, it
has to use the content. The head is dropped after pretraining, and a linear classifier on the features needs few labels
(`experiments.vision.linear_probe`).

    ./launch.sh local experiments.vision.simclr_pretrain --config digits --workdir runs/simclr  # two cores, two minutes
    ./launch.sh local experiments.vision.simclr_pretrain --config cifar10 --data.source.download true      # one GPU
    ./launch.sh local experiments.vision.simclr_pretrain --data.source folder --data.source.path photos  # the paper's

The default is the paper's recipe (section 2.3): ResNet-50, batch size 4096, 1000 epochs, LARS with learning rate 0.3 ·
batch size / 256 = 4.8 and weight decay 1e-6, 10 epochs of warm-up, cosine schedule, temperature 0.1, full colour jitter
and blur. Negatives and batch statistics come from all devices. It needs a pod. Expected top-1 of a linear classifier on
ImageNet: 69.3 %, with `wide2` and `wide4` 74.2 and 76.5 % (table 6).
`cifar10` is the setting of the authors' code (README of google-research/simclr): ResNet-18, batch size 512, learning
rate 1.0 · batch size / 256 = 2.0, temperature 0.5, jitter 0.5, no blur. Expected: about 91 %. Neither was run here.
`digits` is a ResNet-8 of 78 thousand parameters; `linear_probe` has its measured table.

In Python, `backbone` may be any ResNet, EfficientNet or ViT. A classifier with the same backbone starts from the run's
work directory (`--init.from`). `neighbours.png` shows validation images with their nearest training images in feature
space. `results.json` has the loss, the share of views whose partner is nearest, and the accuracy of a
k-nearest-neighbour classifier.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fm_jax import cli
from fm_jax.checkpoint import model as models
from fm_jax.core import statistics, tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.data.images import pictures, views
from fm_jax.data.images.image import denormalise
from fm_jax.data.stream import loader
from fm_jax.data.stream.rows import Rows, spread
from fm_jax.evals import runner
from fm_jax.evals.features import embeddings, neighbours
from fm_jax.evals.report import grids, results
from fm_jax.models.vision import resnet
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.objectives.contrastive import nt_xent
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import vision as vision_models
from fm_jax.train import loop, stage, state

LARS = optimizers.Config(name="lars", weight_decay=1e-6, clip_norm=None)


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    backbone: vision_models.Backbone
    data: pictures.Config
    batch_size: int  # images per step, each in two views; over all devices
    temperature: float
    out: int = 128  # output width of the head
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.01  # share of the steps
    optimizer: optimizers.Config = LARS
    known: int = 4000  # maximum images per split for the nearest-neighbour search
    shown: int = 8  # validation images in neighbours.png

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        super().__post_init__()
        if self.accumulate != 1:
            raise ConfigError("accumulate must be 1: the loss compares all views of a batch")
        if self.data.recipe.views != 2:
            raise ConfigError(f"data.recipe.views must be 2, not {self.data.recipe.views}: the loss compares two views")
        if self.data.recipe.small:
            raise ConfigError(
                f"data.recipe.small must be 0, not {self.data.recipe.small}: the loss has no use for small views"
            )
        for name, least in (("batch_size", 2), ("out", 1), ("known", 1), ("shown", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")


def config(multiplier: float = 1.0) -> Config:
    """Return the recipe of Chen et al. 2020, section 2.3, on ImageNet (1 % of the images is held out)."""
    data = replace(pictures.imagenet(), recipe=views.simclr(1.0))
    fit = stage.epochs(1000, pictures.IMAGENET_TRAIN, 4096)
    net = replace(resnet.resnet50(multiplier), dtype="bfloat16")
    return Config(backbone=net, data=data, fit=fit, learning_rate=4.8, batch_size=4096, temperature=0.1, workers=16)


def cifar10() -> Config:
    """Return the authors' setting for CIFAR-10 (theirs trains on 50,000 images; 5,000 are held out here)."""
    data = replace(pictures.cifar(), recipe=views.simclr(0.5, blur=0.0))
    net = replace(resnet.resnet18(), stem="small")
    return replace(
        config(),
        backbone=net,
        data=data,
        fit=stage.epochs(1000, 45_000, 512),
        learning_rate=2.0,
        batch_size=512,
        temperature=0.5,
        workers=8,
    )


def digits() -> Config:
    """Return the preset for two cores and two minutes: a ResNet-8 on the built-in digits.

    In so few steps a constant learning rate is better than a cosine schedule: 0.89 against 0.87 with one label per
    class (one seed, each block's last scale initialised to 0).
    """
    return Config(
        backbone=resnet.cifar(8),
        data=pictures.Config(recipe=views.digits(2)),
        fit=loop.FitConfig(230, log_every=10),
        learning_rate=2e-3,
        batch_size=256,
        temperature=0.5,
        out=32,
        schedule="constant",
        warmup=0.0,
        optimizer=optimizers.Config(name="adam"),
    )


def debug() -> Config:
    """Return two steps of a tiny network."""
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    return replace(digits(), backbone=resnet.tiny(), fit=fit, batch_size=16, out=8, shown=2)


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "wide2": partial(config, 2.0),
    "wide4": partial(config, 4.0),
    "cifar10": cifar10,
    "digits": digits,
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, float]:
    """Pretrain, evaluate, and return the metrics, also written to results.json."""
    mesh = stage.open_mesh(cfg)
    data_dir = cfg.data_dir or workdir / "data"
    train = pictures.training(cfg.data, data_dir)
    batches = stage.batches(cfg, train)
    # the same two views of every image, whenever they are asked for
    images = pictures.pictures(cfg.data, "validation", data_dir)
    held_out = pictures.Training(images, cfg.data, pictures.labels(images, cfg.data))

    model, key = SimCLR(models.of(cfg.backbone), cfg.out), jax.random.key(cfg.seed)
    loss = nt_xent(model.apply, temperature=cfg.temperature)
    evaluate = runner.make_eval_step(loss, tree.merge)

    inputs = (np.zeros((2, cfg.data.size, cfg.data.size, cfg.backbone.in_channels), np.float32),)

    def make_params() -> tuple[Params, Params]:
        return statistics.split(state.init_params(model, inputs, key, mesh))

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        return runner.evaluate(evaluate, (now.params, now.frozen), stage.one_pass(cfg, held_out, mesh))

    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, stage.rates(cfg, cfg.schedule), make_params),
        make_params=make_params,
        batches=batches,
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg)},
        layout=state.layout(model, inputs, mesh),
        validate=validate,
        work=loop.Work(2 * cfg.batch_size, "views"),
    )
    with jax.set_mesh(mesh):
        measured = validate(cfg.fit.num_steps, done)
        backbone = tree.merge(done.params, done.frozen)["backbone"]
        measured["neighbours_accuracy"] = neighbours_picture(cfg, backbone, data_dir, workdir / "neighbours.png")
    results.write(workdir / "results.json", measured)
    return measured


def neighbours_picture(cfg: Config, params: Params, data_dir: Path, png: Path) -> float:
    """Write a picture of nearest neighbours; return the accuracy of a 20-nearest-neighbour classifier."""
    backbone, embedded, shown = models.of(cfg.backbone), [], []
    for split in ("validation", "train"):
        rows = spread(pictures.evaluation(cfg.data, split, data_dir), cfg.known)
        weights: list[np.ndarray] = []

        def noted(rows: Rows = rows, weights: list[np.ndarray] = weights) -> Iterator[loader.HostBatch]:
            for batch in loader.Epoch(rows, min(cfg.batch_size, len(rows))):
                weights.append(batch["weights"])
                yield batch

        embedded.append(
            embeddings.embed(lambda params, batch: backbone.apply({"params": params}, batch["image"]), params, noted())
        )
        shown.append(Shown(rows, np.flatnonzero(np.concatenate(weights)), cfg.data))
    queries, known = embedded
    few = np.arange(min(cfg.shown, len(queries))) * len(queries) // min(cfg.shown, len(queries))
    if jax.process_index() == 0:
        grids.neighbours(
            png,
            [shown[0][int(row)] for row in few],
            shown[1],
            (queries.features[few], known.features),
            (queries.labels[few], known.labels),
            k=min(8, len(known)),
            title="Nearest training images in SimCLR's feature space",
        )
    return neighbours.knn(known, queries)["top1"]


class Shown(Sequence[np.ndarray]):
    """Images to display, uint8 [S, S, 3], without those that could not be decoded."""

    def __init__(self, rows: Rows, kept: np.ndarray, cfg: pictures.Config) -> None:
        self._rows, self._kept, self._cfg = rows, kept, cfg

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return denormalise(self._rows[int(self._kept[index])]["image"], self._cfg.mean, self._cfg.std)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
