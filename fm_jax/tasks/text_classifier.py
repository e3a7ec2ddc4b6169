"""Train and score a text classifier on a pretrained encoder or decoder, by one of five methods.

The method says which parameters are trained:

    scratch   all of them, randomly initialised: the baseline without pretraining
    probe     only the new head
    lora      the head and low-rank updates of the matrices named by `lora.targets`
    full      all parameters
    frozen    all but the embeddings and the first `frozen_layers` layers

Dims: N texts, C classes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from fm_jax.checkpoint import surgery
from fm_jax.core import tree
from fm_jax.core.config import check_least
from fm_jax.core.types import Params
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import layout
from fm_jax.evals import metrics, runner
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language.encoder import Encoder
from fm_jax.objectives.classify import softmax
from fm_jax.peft import freeze
from fm_jax.peft import lora as adapters
from fm_jax.tasks import language
from fm_jax.tasks.init import combining
from fm_jax.train import log, loop, stage, state

Method = Literal["scratch", "probe", "lora", "full", "frozen"]
METHODS: tuple[Method, ...] = ("scratch", "probe", "lora", "full", "frozen")
_ROWS = 64  # texts per evaluation batch


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the training of a classifier."""

    fit: loop.FitConfig = loop.FitConfig(300)
    learning_rate: float = 3e-4
    batch_size: int = 32  # texts per step, over all devices; at most all of them
    warmup: float = 0.1  # share of the steps; then linear decay to 0
    method: Method = "full"  # which parameters are trained
    head: language.Head = "default"  # pooling: mean or last for a decoder, first or mean for an encoder
    length: int = 128  # maximum tokens of a text, or of a pair together
    lora: adapters.Config = adapters.Config(rank=8, alpha=16.0, trainable=("head/.*",))
    frozen_layers: int = 2  # with method frozen

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        check_least(self, length=1, frozen_layers=0)


class Setup:
    """Model, mesh and one compiled step per method and learning rate, shared by several runs."""

    def __init__(self, pretrained: Pretrained, classes: tuple[str, ...], cfg: Config, mesh: Mesh) -> None:
        """Build the model without initialising parameters.

        Args:
            pretrained: result of `language.load`.
            classes: class names, in order.
            cfg: settings of all runs. Each run has its own method, learning rate and seed (for head and batches);
                `cfg.seed` seeds dropout.
            mesh: result of `stage.open_mesh`.
        """
        assert pretrained.tokenizer is not None  # `load` refuses a model without one
        self.tokenizer = pretrained.tokenizer
        self.classes, self.cfg, self.mesh = classes, cfg, mesh
        self.model, self.given = language.classifier(pretrained, classes, cfg.head)
        backbone = self.model.backbone
        # token types mark the two texts of a pair
        paired = isinstance(backbone, Encoder) and backbone.cfg.num_types > 1
        self.fields = ("tokens", "length", *(("types",) if paired else ()))
        self.inputs = (np.zeros((1, cfg.length), np.int32), np.ones(1, np.int32))
        self.layout = state.layout(self.model, self.inputs, mesh)
        self.trainer = cache(self._trainer)  # each compiled once
        self.logits = jax.jit(
            lambda params, batch: self.model.apply({"params": params}, *(batch[name] for name in self.fields))
        )

    def rows(self, examples: docstrings.Examples, name: str) -> layout.Labelled:
        """Tokenize texts, truncated or padded to the configured length."""
        return layout.Labelled(
            examples.texts,
            examples.labels,
            self.tokenizer,
            second=examples.second or None,
            length=self.cfg.length,
            num_classes=len(self.classes),
            name=name,
        )

    def check(self, method: Method) -> None:
        """Raise, before any compilation, the error that a run of this method would raise for its parameters."""
        jax.eval_shape(lambda: self.params(method, 0))

    def params(self, method: Method, seed: int) -> tuple[Params, Params]:
        """Return the initial (trained, frozen) parameters; `seed` initialises the head."""
        fresh = state.init_params(self.model, self.inputs, jax.random.key(seed), self.mesh)
        if method == "scratch":
            return fresh, {}
        new = sorted(set(tree.flatten(fresh)) - set(tree.flatten(self.given)))
        params = surgery.load(fresh, self.given, fresh=[re.escape(path) for path in new if path.startswith("head/")])
        if method == "probe":
            return freeze.by_pattern(params, ("head/.*",))
        if method == "lora":
            return adapters.split(jax.random.key(seed + 1), params, self.cfg.lora)
        if method == "frozen":
            return freeze.below(params, self.cfg.frozen_layers, stacked="backbone/blocks")
        return params, {}

    def fit(
        self,
        method: Method,
        learning_rate: float,
        rows: layout.Labelled,
        seed: int,
        workdir: Path,
        *,
        meta: Mapping[str, Any],
        store: bool = True,
        writer: log.Writer | None = None,
    ) -> tuple[Params, Params]:
        """Train one classifier; return all its parameters, and the trained ones alone.

        Args:
            method: which parameters are trained.
            learning_rate: peak learning rate.
            rows: training rows.
            seed: initialises the head and orders the rows.
            workdir: see `stage.train`.
            meta: see `stage.train`.
            store: see `stage.train`.
            writer: see `stage.train`.
        """
        cfg = stage.at_most(replace(self.cfg, seed=seed), len(rows), self.mesh)
        done = stage.train(
            cfg,
            workdir,
            self.trainer(method, learning_rate),
            make_params=lambda: self.params(method, seed),
            batches=stage.batches(cfg, rows),
            mesh=self.mesh,
            model=self.model,
            meta={**meta, "classes": list(self.classes)},
            files=language.kept(self.tokenizer),
            layout=self.layout,
            work=loop.Work(cfg.batch_size, "rows"),
            store=store,
            writer=writer,
        )
        return combining(method, self.cfg.lora)(done.params, done.frozen), done.params

    def probabilities(self, params: Params, rows: layout.Labelled) -> np.ndarray:
        """Return the class probabilities [N, C] of all rows."""
        with jax.set_mesh(self.mesh):
            logits, _ = runner.predict(self.logits, params, stage.one_pass(self.cfg, rows, self.mesh, rows=_ROWS))
        return np.asarray(jax.nn.softmax(logits))

    def _trainer(self, method: Method, learning_rate: float) -> stage.Trainer:
        cfg = replace(self.cfg, learning_rate=learning_rate)
        loss, rates = softmax(self.model.apply, self.fields), stage.rates(cfg, "linear")
        combined = combining(method, cfg.lora)
        return stage.make_trainer(cfg, loss, rates, lambda: self.params(method, 0), combine=combined)


def scores(probabilities: np.ndarray, rows: layout.Labelled) -> dict[str, float]:
    """Return accuracy, macro-F1 and expected calibration error of predicted probabilities [N, C]."""
    labels = np.array([int(rows[index]["label"]) for index in range(len(rows))])
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": metrics.accuracy(labels, predicted),
        "macro_f1": metrics.macro_f1(labels, predicted),
        "calibration_error": metrics.expected_calibration_error(probabilities, labels),
    }
