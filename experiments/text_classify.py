"""Finetuning a pretrained encoder or decoder to classify texts, or pairs of texts, five ways.

Papers: Radford et al. 2018 (pretrain, then train all of it with a new head), Devlin et al. 2019 (BERT's head), Hu et
al. 2022 (LoRA), Howard & Ruder 2018 (frozen lower layers). Idea: what pretraining learnt is reused; how much of the
model has to move is a choice:

    scratch   nothing is reused: same model, drawn anew, all of it trained
    probe     nothing but the new head is trained
    lora      the head, and low-rank updates of the matrices that `lora.targets` names
    full      everything is trained
    frozen    the embeddings and the first `frozen_layers` layers stay, the rest is trained

    ./launch.sh local experiments.text_classify --init.from runs/gpt2 --way lora --data.path reviews
    ./launch.sh local experiments.text_classify --init.from bert --data.path mnli --data.second hypothesis --export mine
    ./launch.sh local experiments.text_classify --init.from runs/quickstart/pretrain    # the docstring task

`--init.from` is the work directory of an `lm_pretrain` or `bert_pretrain` run, a folder as `transformers` writes it, or
OWNER/NAME. `--data.path` is a folder of train.jsonl, validation.jsonl and test.jsonl with a "text" and a "label" a
line. `--export` writes a folder that `transformers` opens, LoRA's updates merged in (and alone, for `peft`, in its
folder `adapter`); of a decoder that has `--head last` only.
Hardware and time: two cores and half a minute with the quickstart's model; one 24 GB GPU for BERT base or GPT-2 124M.
Expected: the quickstart's table is this module's measured result.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax.core import meta
from jax.sharding import Mesh

from fm_jax import run as command_line
from fm_jax.checkpoint import surgery
from fm_jax.checkpoint.store import Store
from fm_jax.core import mesh as meshes
from fm_jax.core import tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Params
from fm_jax.data import docstring_task, labelled, loader, text
from fm_jax.evals import metrics, results, runner
from fm_jax.hub import adapter, families
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language.encoder import Encoder
from fm_jax.objectives.classify import softmax
from fm_jax.optim import optimizer as optimizers
from fm_jax.optim import schedule
from fm_jax.peft import freeze
from fm_jax.peft import lora as adapters
from fm_jax.tasks import language
from fm_jax.tasks.init import Init
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
    length: int = 128  # tokens of a text (or of a pair together) that are read
    warmup: float = 0.1  # share of the steps
    optimizer: optimizers.Config = optimizers.Config()
    lora: adapters.Config = adapters.Config(rank=8, alpha=16.0, trainable=("head/.*",))
    frozen_layers: int = 2


@dataclass(frozen=True)
class Config:
    """One finetuning run."""

    init: Init = Init(Path("runs/lm_pretrain"))
    way: Way = "full"
    head: language.Head = "default"  # what is read: a decoder's mean (or last) state, an encoder's first (or mean)
    data: labelled.Config = labelled.Config()
    labels: int = 0  # training examples a class; 0 for all there are
    recipe: Recipe = Recipe()
    mesh: meshes.MeshConfig = meshes.MeshConfig()
    export: Path | None = None  # folder to write for transformers; must not exist yet
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        if self.labels < 0:
            raise ConfigError(f"labels must be at least 0 (all there are), not {self.labels}")


class Bench:
    """What several runs share: model, mesh and, for each way and learning rate, one compiled step."""

    def __init__(
        self,
        found: Pretrained,
        classes: tuple[str, ...],
        recipe: Recipe,
        mesh: Mesh,
        seed: int,
        head: language.Head = "default",
    ) -> None:
        """Draw nothing yet; `seed` is of the dropout and the batches, each run brings its own for the weights."""
        assert found.tokenizer is not None  # `load` refuses a model without one
        self.tokenizer = found.tokenizer
        self.classes, self.recipe, self.mesh, self.seed = classes, recipe, mesh, seed
        self.model, self.given = language.classifier(found, classes, head)
        backbone = self.model.backbone
        paired = isinstance(backbone, Encoder) and backbone.cfg.num_types > 1  # it tells the texts of a pair apart
        self.inputs = ("tokens", "length", *(("types",) if paired else ()))
        # made once, so that no run compiles again what another has compiled
        self.step, self.create = cache(self._step), cache(self._create)
        self.logits = jax.jit(
            lambda params, batch: self.model.apply({"params": params}, *(batch[name] for name in self.inputs))
        )

    def rows(self, examples: docstring_task.Examples, name: str) -> text.Labelled:
        """Tokenise texts and cut or pad them to the recipe's length."""
        return text.Labelled(
            examples.texts,
            examples.labels,
            self.tokenizer,
            second=examples.second or None,
            length=self.recipe.length,
            num_classes=len(self.classes),
            name=name,
        )

    def start(self, way: Way, seed: int) -> tuple[Params, Params]:
        """Return (trained, frozen) parameters before the first step; the head is drawn from `seed`."""
        fresh = state.init_params(self._init, jax.random.key(seed), self.mesh)
        if way == "scratch":
            return fresh, {}
        drawn = sorted(set(tree.flatten(fresh)) - set(tree.flatten(self.given)))
        params = surgery.load(fresh, self.given, fresh=[re.escape(path) for path in drawn if path.startswith("head/")])
        return self._divide(way, params, seed)

    def check(self, way: Way) -> None:
        """Raise, before anything is compiled, what a run of this way would raise about its parameters."""
        jax.eval_shape(lambda: self._divide(way, meta.unbox(self._init(jax.random.key(0))), 0))

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

    def _divide(self, way: Way, params: Params, seed: int) -> tuple[Params, Params]:
        """Return (trained, frozen) of the whole model's parameters."""
        if way == "probe":
            return freeze.by_pattern(params, ("head/.*",))
        if way == "lora":
            return adapters.split(jax.random.key(seed + 1), params, self.recipe.lora)
        if way == "frozen":
            return freeze.below(params, self.recipe.frozen_layers, stacked="backbone/blocks")
        return params, {}

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
        loss, key = softmax(self.model.apply, self.inputs), jax.random.key(self.seed)
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
    """Return two steps on the tiny model that `lm_pretrain --config debug --workdir runs/lm_pretrain_debug` leaves."""
    return Config(Init(Path("runs/lm_pretrain_debug")), labels=2, recipe=Recipe(num_steps=2, length=16, batch_size=8))


def check_export(folder: Path, bench: Bench) -> None:
    """Raise, before anything is computed, what would keep the classifier from being written for transformers."""
    if folder.exists():
        raise CheckpointError(f"--export {folder} exists already; give another folder, or move it away")
    words = families.writing(bench.model).fields(bench.model)
    public.check_form(bench.model, words | {"pad_token_id": bench.tokenizer.special("pad")})


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Finetune once, evaluate on validation and test, and write results.json (and, for LoRA, the adapter alone)."""
    mesh, found = meshes.make_mesh(cfg.mesh), language.load(cfg.init.source, revision=cfg.init.revision)
    task = labelled.load(cfg.data, workdir / "data")
    few = docstring_task.few(task.train, cfg.labels, seed=cfg.seed) if cfg.labels else task.train
    bench = Bench(found, task.classes, cfg.recipe, mesh, cfg.seed, cfg.head)
    bench.check(cfg.way)
    if cfg.export:
        check_export(cfg.export, bench)
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
    if cfg.export:
        public.save(cfg.export, bench.model, params, bench.tokenizer, labels=task.classes)
        if cfg.way == "lora":
            lora = cfg.recipe.lora
            options: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha, "base": cfg.init.source}
            options |= {"revision": cfg.init.revision}
            adapter.save(cfg.export / "adapter", bench.model, trained, **options)
    return measured


if __name__ == "__main__":
    command_line.main(run, {"default": config, "debug": debug}, resumable=("mesh.*", "export"))
