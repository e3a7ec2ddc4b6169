"""Finetuning a pretrained language model to classify texts, five ways.

Papers: Radford et al. 2018 (pretrain, then train all of it with a new head), Hu et al. 2022 (LoRA), Howard & Ruder 2018
(frozen lower layers). Idea: what pretraining learnt is reused; how much of the model has to move is a choice:

    scratch   nothing is reused: same model, drawn anew, all of it trained
    probe     nothing but the new linear head is trained
    lora      the head, and low-rank updates of the matrices that `lora.targets` names
    full      everything is trained
    frozen    the embeddings and the first `frozen_layers` layers stay, the rest is trained

    ./launch.sh local experiments.lm_finetune --pretrained runs/gpt2 --way lora --data.path reviews
    ./launch.sh local experiments.lm_finetune --pretrained runs/quickstart/pretrain    # the docstring task

`--data.path` is a folder of train.jsonl, validation.jsonl and test.jsonl with a "text" and a "label" a line.
Hardware and time: two cores and half a minute with the quickstart's model; one 24 GB GPU for GPT-2 124M.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fm_jax import run as command_line
from fm_jax.checkpoint import surgery
from fm_jax.checkpoint.store import Store, load_meta, load_params
from fm_jax.core import mesh as meshes
from fm_jax.core import tree
from fm_jax.core.config import from_dict, to_dict
from fm_jax.core.types import Params
from fm_jax.data import docstring_task, labelled, loader, text, tokenizer
from fm_jax.evals import metrics, results, runner
from fm_jax.models.language import decoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.objectives.classify import softmax
from fm_jax.optim import optimizer as optimizers
from fm_jax.optim import schedule
from fm_jax.peft import freeze
from fm_jax.peft import lora as adapters
from fm_jax.train import log, loop, state
from fm_jax.train.step import Step, make_train_step

Way = Literal["scratch", "probe", "lora", "full", "frozen"]
WAYS: tuple[Way, ...] = ("scratch", "probe", "lora", "full", "frozen")


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained, the same for every way but for the learning rate."""

    num_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-4
    length: int = 128  # tokens of a text that are read
    warmup: float = 0.1  # share of the steps
    optimizer: optimizers.Config = optimizers.Config()
    lora: adapters.Config = adapters.Config(rank=8, alpha=16.0, trainable=("head/.*",))
    frozen_layers: int = 2


@dataclass(frozen=True)
class Config:
    """One finetuning run."""

    pretrained: Path = Path("runs/lm_pretrain")  # work directory of a pretraining run
    way: Way = "full"
    data: labelled.Config = labelled.Config()
    labels: int = 0  # training examples a class; 0 for all there are
    recipe: Recipe = Recipe()
    mesh: meshes.MeshConfig = meshes.MeshConfig()
    seed: int = 0


@dataclass(frozen=True)
class Pretrained:
    """What pretraining left: the model's config, its tokenizer and its parameters."""

    model: decoder.Config
    tokenizer: tokenizer.Tokenizer
    params: Params


def open_pretrained(workdir: Path) -> Pretrained:
    """Read the best checkpoint of an `lm_pretrain` run."""
    config = load_meta(workdir / "checkpoints", "best")["config"]["model"]
    params = load_params(workdir / "checkpoints", "best")
    return Pretrained(from_dict(decoder.Config, config), tokenizer.load(workdir / "tokenizer"), params)


class Bench:
    """What several runs share: model, mesh and, for each way and learning rate, one compiled step."""

    def __init__(self, pretrained: Pretrained, classes: tuple[str, ...], recipe: Recipe, mesh: Mesh, seed: int) -> None:
        """Draw nothing yet; `seed` is of the dropout and the batches, each run brings its own for the weights."""
        self.pretrained, self.classes, self.recipe, self.mesh, self.seed = pretrained, classes, recipe, mesh, seed
        self.model = Classifier(decoder.Decoder(pretrained.model), len(classes))
        # made once, so that no run compiles again what another has compiled
        self.step, self.create = cache(self._step), cache(self._create)
        self.logits = jax.jit(
            lambda params, batch: self.model.apply({"params": params}, batch["tokens"], batch["length"])
        )

    def rows(self, examples: docstring_task.Examples, name: str) -> text.Labelled:
        """Tokenise texts and cut or pad them to the recipe's length."""
        return text.Labelled(
            examples.texts,
            examples.labels,
            self.pretrained.tokenizer,
            length=self.recipe.length,
            num_classes=len(self.classes),
            name=name,
        )

    def start(self, way: Way, seed: int) -> tuple[Params, Params]:
        """Return (trained, frozen) parameters before the first step; the head is drawn from `seed`."""
        fresh = state.init_params(self._init, jax.random.key(seed), self.mesh)
        if way == "scratch":
            return fresh, {}
        rename, unused = (("(.*)", r"backbone/\1"),), () if self.pretrained.model.tied else ("head/.*",)
        params = surgery.load(fresh, self.pretrained.params, rename=rename, fresh=("head/.*",), unused=unused)
        if way == "probe":
            return freeze.by_pattern(params, ("head/.*",))
        if way == "lora":
            return adapters.split(jax.random.key(seed + 1), params, self.recipe.lora)
        if way == "frozen":
            return freeze.below(params, self.recipe.frozen_layers, stacked="backbone/blocks")
        return params, {}

    def combine(self, way: Way) -> Callable[[Params, Params], Params]:
        """Return how (trained, frozen) make the model's parameters."""
        return {"lora": adapters.combine(self.recipe.lora), "frozen": freeze.combine}.get(way, tree.merge)

    def train(
        self,
        way: Way,
        learning_rate: float,
        rows: text.Labelled,
        seed: int,
        writer: log.Writer,
        store: Store | None = None,
    ) -> tuple[Params, Params]:
        """Train one classifier; return the whole model's parameters, and the trained ones alone."""
        recipe = self.recipe
        _, step = self.step(way, learning_rate)
        batches = loader.Batches(rows, min(recipe.batch_size, len(rows)), seed=seed)
        begun = loop.start(
            self.create(way, learning_rate),
            lambda: self.start(way, seed),
            self.mesh,
            store=store,
            batches=batches,
        )
        fit = loop.FitConfig(recipe.num_steps)
        done = loop.fit(fit, step, begun, batches, mesh=self.mesh, writer=writer, store=store)
        return self.combine(way)(done.params, done.frozen), done.params

    def probabilities(self, params: Params, rows: text.Labelled) -> np.ndarray:
        """Return the class probabilities [N, C] of all rows."""
        logits, _ = runner.predict(self.logits, params, loader.Epoch(rows, 64))
        return np.asarray(jax.nn.softmax(logits))

    def _init(self, key: jax.Array) -> Any:
        tokens, length = np.zeros((1, self.recipe.length), np.int32), np.ones(1, np.int32)
        return self.model.init(key, tokens, length, mutable=["params"])["params"]

    def _create(self, way: Way, learning_rate: float) -> Callable[[Params, Params], state.TrainState]:
        tx, _ = self.step(way, learning_rate)
        return lambda params, frozen: state.create(params, tx, frozen=frozen, ema=False)

    def _step(self, way: Way, learning_rate: float) -> tuple[optax.GradientTransformation, Step]:
        recipe = self.recipe
        plan = schedule.Config(
            kind="linear",
            peak=learning_rate,
            num_steps=recipe.num_steps,
            warmup_steps=int(recipe.warmup * recipe.num_steps),
        )
        tx = optimizers.make(recipe.optimizer, schedule.make(plan), self.start(way, 0)[0])
        loss, key = softmax(self.model.apply), jax.random.key(self.seed)
        return tx, make_train_step(loss, tx, key=key, combine=self.combine(way))


def scores(probabilities: np.ndarray, rows: text.Labelled) -> dict[str, float]:
    """Return accuracy, macro-F1 and expected calibration error of predicted probabilities."""
    labels = np.array([int(rows[index]["label"]) for index in range(len(rows))])
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": metrics.accuracy(labels, predicted),
        "macro_f1": metrics.macro_f1(labels, predicted),
        "calibration_error": metrics.expected_calibration_error(probabilities, labels),
    }


def config() -> Config:
    """Return the defaults: everything trained, on all labels of the built-in task."""
    return Config()


def debug() -> Config:
    """Return two steps on a tiny model, which is pretrained for two steps first if it is not there."""
    return Config(Path("runs/lm_pretrain_debug"), labels=2, recipe=Recipe(num_steps=2, length=16, batch_size=8))


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Finetune once, evaluate on validation and test, and write results.json (and, for LoRA, the adapter alone)."""
    mesh, pretrained = meshes.make_mesh(cfg.mesh), open_pretrained(cfg.pretrained)
    task = labelled.load(cfg.data, workdir / "data")
    few = docstring_task.few(task.train, cfg.labels, seed=cfg.seed) if cfg.labels else task.train
    bench = Bench(pretrained, task.classes, cfg.recipe, mesh, cfg.seed)
    splits = {"train": few, "validation": task.validation, "test": task.test}
    rows = {name: bench.rows(examples, name) for name, examples in splits.items()}
    writer = log.writers(workdir, step=0, num_steps=cfg.recipe.num_steps, tensorboard=True)
    with Store(workdir / "checkpoints", meta={"config": to_dict(cfg)}) as store:
        params, trained = bench.train(cfg.way, cfg.recipe.learning_rate, rows["train"], cfg.seed, writer, store)
    writer.close()
    if cfg.way == "lora":
        adapters.save(workdir / "adapter.safetensors", trained, cfg.recipe.lora)
    measured: dict[str, Any] = {
        split: scores(bench.probabilities(params, rows[split]), rows[split]) for split in ("validation", "test")
    }
    measured["trained_parameters"] = tree.count(trained)
    results.write(workdir / "results.json", measured)
    return measured


if __name__ == "__main__":
    command_line.main(run, {"config": config, "debug": debug}, resumable=("mesh.*",))
