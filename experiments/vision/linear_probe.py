"""Linear probe: logistic regression on frozen features with few labels, compared with training from scratch.

Papers: Chen et al. 2020, section 2.3, Kolesnikov et al. 2019 (linear evaluation). Idea: good features need few labels.
Five methods get the same labelled images; the first three train only a logistic regression:

    pretrained   on the features of `--models`: backbones of runs or checkpoint folders
    untrained    on the features of the same network, randomly initialised
    pixels       on the raw images
    finetuned    the full pretrained network, with the augmentation of its own run
    scratch      the same network, randomly initialised, trained in the same way

    python -m experiments.vision.linear_probe --models runs/simclr
    python -m experiments.vision.linear_probe --models runs/simclr0,runs/simclr1,runs/simclr2  # the table below
    python -m experiments.vision.linear_probe --models facebook/dinov2-base --data.source folder --data.source.path pets

Draw d of the labels uses model d of `--models` (in turn), or random weights of seed d. Features are standardised with
the mean and variance of all training images, which need no labels. The regularisation strength is chosen on the full
validation split. `results.json` has the accuracy of every draw, of ridge regression to ±1 (in closed form), and of a
20-nearest-neighbour classifier with all labels. `accuracy.png` shows the draws.
Hardware: two cores for the digits.

Measured on the digits with three runs of `simclr_pretrain --config digits` (seeds 0 to 2, 230 steps, 67 to 72
CPU-seconds each with the loading of the views; this module 337 CPU-seconds): accuracy on the 450 test images with 1, 5
and 20 labels per class, mean of 6 draws ± half the 95 % interval.

                 1                5                20
    pretrained   0.874 ± 0.027    0.947 ± 0.024    0.983 ± 0.004
    finetuned    0.735 ± 0.022    0.935 ± 0.026    0.991 ± 0.006
    scratch      0.701 ± 0.052    0.934 ± 0.018    0.987 ± 0.004
    pixels       0.620 ± 0.062    0.832 ± 0.015    0.944 ± 0.007
    untrained    0.512 ± 0.080    0.750 ± 0.017    0.867 ± 0.033

With one label per class, frozen features are 0.17 above the best method without pretraining. With five labels they
equal training from scratch with the same augmentation; with twenty they are below it, by no more than the spread of the
draws. The comparison depends on tuning: with learning rate 2e-3, scratch reached only 0.60, 0.89 and 0.89. The learning
rate and the pretraining's augmentation and schedule were chosen with a few draws on the same test images, so a
difference of 0.01 means nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from fm_jax import cli
from fm_jax.checkpoint import surgery
from fm_jax.core import sharding, statistics, tree
from fm_jax.core.config import changes
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, Params
from fm_jax.data.images import pictures
from fm_jax.data.stream.rows import Rows
from fm_jax.data.stream.source import Source
from fm_jax.evals import runner
from fm_jax.evals.features import fewshot, neighbours, probe
from fm_jax.evals.features.embeddings import Embeddings, embed
from fm_jax.evals.metrics import accuracy, mean_interval
from fm_jax.evals.report import report, results
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.vision import vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.objectives.classify import softmax
from fm_jax.tasks import vision as vision_models
from fm_jax.train import log, loop, stage, state

Method = Literal["pretrained", "finetuned", "untrained", "pixels", "scratch"]
TRAINED: tuple[Method, ...] = ("finetuned", "scratch")  # the other methods use frozen features


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """The models, data and methods to compare; the plan is for the networks that are trained."""

    models: tuple[Path, ...] = (Path("runs/simclr_pretrain"),)  # runs or folders of one architecture; several: seeds
    ignore: tuple[str, ...] = ()  # unknown fields of the folders' config.json that change no result
    data: pictures.Config | None = None  # none: the run's own; fields left at their defaults follow the model
    labels: tuple[int, ...] = (1, 5, 20)  # per class; 0: all
    draws: int = 6  # random choices of the labelled images
    methods: tuple[Method, ...] = ("pretrained", "finetuned", "untrained", "pixels", "scratch")
    pool: vit.Pool | None = None  # features of a Vision Transformer; none: the model's own
    fit: loop.FitConfig = loop.FitConfig(200)
    batch_size: int = 64  # images per step, over all devices; at most the number of labelled images
    learning_rate: float = 1e-2  # scratch on digits, 20 labels per class: accuracy 0.99; with 2e-3 0.89
    embed_batch: int = 256  # images per batch of feature extraction

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        if not self.models or not self.labels or min(self.labels) < 0 or self.draws < 1 or self.embed_batch < 1:
            raise ConfigError(
                f"models ({len(self.models)} paths), draws {self.draws} and embed_batch {self.embed_batch} must be at "
                f"least 1, and labels {self.labels} numbers of at least 0"
            )


class Setup:
    """What the draws share: the splits, features computed once, and a step compiled once."""

    def __init__(self, cfg: Config, data: pictures.Config, workdir: Path) -> None:
        """Open models and splits without computing anything."""
        self.cfg, self.workdir, self.mesh = cfg, workdir, stage.open_mesh(cfg)
        self.models = [pooled(vision_models.load(path, ignore=cfg.ignore), cfg.pool) for path in cfg.models]
        self.module = self.models[0].module
        if others := [path for path, one in zip(cfg.models, self.models, strict=True) if one.module != self.module]:
            raise ConfigError(
                f"{others[0]} has another architecture than {cfg.models[0]}; probe one architecture at a time"
            )
        seen = vision_models.as_trained(self.models[0], data)
        if taken := changes(data, seen):
            print(
                "preprocessing of the pretrained model:",
                *(f"--data.{name} {value}" for name, (_, value) in taken.items()),
            )
        self.data, data_dir = seen, cfg.data_dir or workdir / "data"
        self.splits = {split: pictures.evaluation(seen, split, data_dir) for split in pictures.SPLITS}
        self.views = pictures.training(replace(seen, recipe=replace(seen.recipe, views=1, small=0)), data_dir)
        self.inputs = (np.zeros((2, seen.size, seen.size, 3), np.float32),)
        self.classifier = ImageClassifier(self.module, self.views.limits["label"])
        self.features, self.trainer = cache(self._features), cache(self._trainer)  # each made once
        self.logits = jax.jit(lambda params, batch: self.classifier.apply({"params": params}, batch["image"]))
        self.vectors = jax.jit(lambda params, batch: self.module.apply({"params": params}, batch["image"]))

    def probe(self, method: Method, labels: int, draw: int) -> float:
        """Return the test accuracy of one method on one draw of labels; 0 means all labels."""
        if method in TRAINED:
            return self._trained(method, self.rows(self._labels(), labels, draw), draw)
        train, valid, test = self.features(method, self.number(method, draw))
        few = train.take(self.rows(train.labels, labels, draw))
        return probe.linear_probe(few, valid, test, moments=train)["test_accuracy"]

    def number(self, method: Method, draw: int) -> int:
        """Return the number of the model, or the seed of the random weights, that a draw uses."""
        return {"untrained": draw, "pixels": 0}.get(method, draw % len(self.models))

    def _features(self, method: Method, number: int) -> tuple[Embeddings, ...]:
        """Return one method's features of the three splits."""
        apply: Callable[[Params, Batch], jax.Array] = self.vectors
        params: Params = {}
        if method == "pixels":
            apply = _pixels
        elif method == "untrained":
            params = self._fresh(self.module, number)
        else:
            params = self._placed(self.models[number].params)
        with jax.set_mesh(self.mesh):
            return tuple(embed(apply, params, self._once(source)) for source in self.splits.values())

    def _trained(self, method: Method, rows: np.ndarray, draw: int) -> float:
        """Train the full network on these rows; return its test accuracy."""
        cfg = stage.at_most(replace(self.cfg, seed=self.cfg.seed + draw), len(rows), self.mesh)
        done = stage.train(
            cfg,
            self.workdir,
            self.trainer(),
            make_params=lambda: self._params(method, draw),
            batches=stage.batches(cfg, Rows(self.views, rows)),
            mesh=self.mesh,
            model=self.classifier,
            meta={},
            layout=state.layout(self.classifier, self.inputs, self.mesh),
            store=False,
            writer=log.Tee([]),
        )
        params = tree.merge(done.params, done.frozen)
        with jax.set_mesh(self.mesh):
            logits, truth = runner.predict(self.logits, params, self._once(self.splits["test"]))
        return accuracy(truth, logits.argmax(axis=1))

    def _trainer(self) -> stage.Trainer:
        loss = softmax(self.classifier.apply, ("image",))
        return stage.make_trainer(self.cfg, loss, stage.rates(self.cfg), lambda: self._params("scratch", 0))

    def _params(self, method: Method, draw: int) -> tuple[Params, Params]:
        """Return (trained, running statistics) before the first step."""
        params = self._fresh(self.classifier, draw)
        if method == "finetuned":
            given = {"backbone": self.models[self.number(method, draw)].params}
            params = surgery.load(params, given, fresh=("head/.*",))
        return statistics.split(params)

    def _fresh(self, module: nn.Module, seed: int) -> Params:
        """Return randomly initialised parameters."""
        # far from the runs' own seeds, so that no run's initial parameters are used again
        return state.init_params(module, self.inputs, jax.random.key(1000 + self.cfg.seed + seed), self.mesh)

    def _placed(self, params: Params) -> Params:
        """Return parameters that this process read, replicated on all devices of the mesh."""

        def place(leaf: Any) -> jax.Array:
            array = np.asarray(leaf)
            return jax.make_array_from_callback(array.shape, sharding.replicated(self.mesh), lambda index: array[index])

        placed: Params = jax.tree.map(place, params)
        return placed

    def rows(self, truth: np.ndarray, labels: int, draw: int) -> np.ndarray:
        """Return the labelled rows of a draw; they are the same for every method."""
        if not labels:
            return np.arange(len(truth))
        return fewshot.pick(truth, labels, np.random.default_rng((self.cfg.seed, labels, draw)))

    def _labels(self) -> np.ndarray:
        """Return the training images' labels."""
        return self.features("pretrained", 0)[0].labels

    def _once(self, source: Source) -> Iterator[Batch]:
        return stage.one_pass(self.cfg, source, self.mesh, rows=min(self.cfg.embed_batch, len(source)))


def pooled(pretrained: Pretrained, pool: vit.Pool | None) -> Pretrained:
    """Return the Vision Transformer with the features of `pool`.

    Raises:
        ConfigError: the model is not a Vision Transformer.
    """
    if pool is None:
        return pretrained
    if not isinstance(pretrained.module, vit.ViT):
        raise ConfigError(
            f"pool {pool} needs a Vision Transformer, not a model of class {type(pretrained.module).__name__}"
        )
    return replace(pretrained, module=vit.ViT(replace(pretrained.module.cfg, pool=pool)))


def _pixels(params: Params, batch: Batch) -> jax.Array:
    return batch["image"].reshape(len(batch["image"]), -1)


def config() -> Config:
    """Return the full comparison."""
    return Config()


def debug() -> Config:
    """Return two draws on the model of `simclr_pretrain --config debug --workdir runs/simclr_debug`."""
    return Config(models=(Path("runs/simclr_debug"),), labels=(1, 2), draws=2, fit=loop.FitConfig(2))


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure every method on every draw, and return accuracies and means, also written to results.json."""
    data = cfg.data or vision_models.images(cfg.models[0])
    if data is None:
        raise ConfigError(
            f"{cfg.models[0]} is a checkpoint folder and names no data; set the images to probe it on with --data"
        )
    setup, measured = Setup(cfg, data, workdir), dict[str, Any]()
    vision_models.remind(setup.models[0], setup.data)
    for method in cfg.methods:
        measured[method] = {
            str(labels or "all"): summary([setup.probe(method, labels, draw) for draw in range(cfg.draws)])
            for labels in cfg.labels
        }
        if method not in TRAINED:
            measured[method] |= others(setup, method)
        print(
            f"{method}: " + ", ".join(f"{name} {one['mean']:.3f}" for name, one in measured[method].items()), flush=True
        )
    results.write(workdir / "results.json", measured)
    if jax.process_index() > 0:
        return measured
    (workdir / "results.md").write_text(table(measured))
    curves = {
        method: {int(name): one["draws"] for name, one in rows.items() if name.isdecimal()}
        for method, rows in measured.items()
    }
    if any(cfg.labels):
        report.accuracy_over_labels(workdir / "accuracy.png", curves, title="Test accuracy with few labels")
    return measured


def others(setup: Setup, method: Method) -> dict[str, Any]:
    """Return the accuracies of ridge regression with few labels and of nearest neighbours with all labels."""
    cfg, numbers = setup.cfg, sorted({setup.number(method, draw) for draw in range(setup.cfg.draws)})
    shots = [labels for labels in cfg.labels if labels]
    every: dict[str, list[float]] = {name: [] for name in (*(f"ridge {labels}" for labels in shots), "neighbours")}
    for number in numbers:
        train, valid, test = setup.features(method, number)
        draws = -(-cfg.draws // len(numbers))
        if shots:
            few = fewshot.few_shot(train, test, shots=shots, draws=draws, valid=valid, seed=cfg.seed + number)
            for labels in shots:
                every[f"ridge {labels}"] += few[str(labels)]["draws"]
        every["neighbours"].append(neighbours.knn(train, test)["top1"])
    return {name: summary(values) for name, values in every.items()}


def summary(values: list[float]) -> dict[str, Any]:
    """Return the mean, half the width of its 95 % interval (None for a single value), and the values."""
    if len(values) == 1:
        return {"mean": values[0], "spread": None, "draws": values}
    interval = mean_interval(values)
    return {"mean": interval.estimate, "spread": (interval.high - interval.low) / 2, "draws": values}


def table(measured: Mapping[str, Any]) -> str:
    """Return one row per method, with test accuracies as mean ± spread."""

    def cell(one: Mapping[str, Any]) -> str:
        return f"{one['mean']:.3f}" + (f" ± {one['spread']:.3f}" if one["spread"] is not None else "")

    rows = [{"method": method} | {name: cell(one) for name, one in entry.items()} for method, entry in measured.items()]
    return report.table(rows, list(rows[0]))


if __name__ == "__main__":
    unplanned = "linear_probe measures frozen features and trains many small networks; plan the pretraining instead"
    cli.main(run, {"default": config, "debug": debug}, resumable=stage.RESUMABLE, unplanned=unplanned)
