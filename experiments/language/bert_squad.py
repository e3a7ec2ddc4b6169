"""Extractive question answering on SQuAD: finetune BERT to find the answer's span in a paragraph.

Papers: Devlin et al. 2019, section 4.2 (BERT); Rajpurkar et al. 2016, 2018 (SQuAD v1.1, v2.0). Idea: the question and
the paragraph are one input row. Each token gets two scores: that the answer starts there, and that it ends there. A
long paragraph is split into overlapping windows. The answer is the text of the span with the best score in any window.

    ./launch.sh local experiments.language.bert_squad --init.from google-bert/bert-base-uncased --data.path squad
    ./launch.sh local experiments.language.bert_squad --init.from runs/bert_pretrain --data.path squad
    ./launch.sh local experiments.language.bert_squad --config demo       # a generated set, from scratch, on two cores

`--data.path` is a folder of SQuAD files: train-v1.1.json and dev-v1.1.json, or train, validation and test files as JSON
lines or Parquet. A test file without answers gets predictions and no score. For questions without an answer (v2.0), a
threshold is chosen on the validation file. `--init.from` is the work directory of a pretraining run, a checkpoint
folder, or OWNER/NAME. Without it the model is randomly initialised and its tokenizer is trained on the training file.

Hardware and time: the default is the authors' recipe for BERT base (README of google-research/bert: learning rate 3e-5,
batch size 12, 2 epochs, 384 tokens, stride 128). It needs one 16 GB GPU and was not run here. Expected on dev v1.1
(table 2 of the paper): exact match 80.8, F1 88.5 (BERT large, batch size 24: 84.1, 90.9).

Measured with `demo` on the generated test file, exact match / F1 (0.4 M parameters, from scratch, 983 steps, 302
CPU-seconds, 17 minutes on two cores shared with other programs). Its names and answers occur in no other file.

    answers by                      type (511)       relation (109)   binding (280)    all (900)
    this model                      0.898 / 0.950    0.413 / 0.437    0.289 / 0.339    0.650 / 0.698
    first span of the right type    1.000 / 1.000    0.450 / 0.450    0.343 / 0.351    0.729 / 0.731
    random span, right length       0.051 / 0.062    0.028 / 0.037    0.043 / 0.060    0.046 / 0.058
    sentence nearest the question   0.000 / 0.204    0.000 / 0.152    0.000 / 0.219    0.000 / 0.203

After so few steps the model has learnt the answer types and nothing else. Where the relation or the person decides, it
is no better than the second row, a baseline that is given the type and takes the first span of that type. The generated
set and the longest answer (8 tokens) were chosen with the test file visible, so this is not a blind result. The effect
of pretraining was not measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fm_jax import cli
from fm_jax.checkpoint import surgery
from fm_jax.core import tree
from fm_jax.core.config import check_least, to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.core.workdir import write_atomically
from fm_jax.data.text import squad, tokenizer
from fm_jax.data.text.squad import Question
from fm_jax.evals import runner
from fm_jax.evals.baselines import spans
from fm_jax.evals.report import report, results
from fm_jax.evals.scores import squad as reading
from fm_jax.models.language import encoder
from fm_jax.models.language.span import SpanFinder
from fm_jax.objectives.span import span
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import language
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import loop, stage, state
from fm_jax.worlds.language import people

_ROWS = 64  # minimum number of windows per evaluation batch


@dataclass(frozen=True)
class Data:
    """The questions' source, and how they are split into windows."""

    path: Path | None = None  # folder of SQuAD files; none: generated paragraphs about people
    world: people.Config = people.Config()  # settings of the generated paragraphs
    window: squad.Cut = squad.Cut()


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    init: Init = Init()
    model: encoder.Config = encoder.bert_base()  # used without init.from; max_length is set to data.window.length
    data: Data = Data()
    # two epochs of the 87,599 questions of v1.1, counted as in the authors' run_squad.py
    fit: loop.FitConfig = loop.FitConfig(14_599, log_every=50)
    batch_size: int = 12  # windows per step, over all devices
    learning_rate: float = 3e-5
    warmup: float = 0.1  # share of the steps; then linear decay to 0
    optimizer: optimizers.Config = optimizers.Config(eps=1e-6)
    longest: int = 30  # maximum tokens of an answer
    best: int = 20  # spans per question in nbest.json

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        check_least(self, longest=1, best=1)


@dataclass(frozen=True)
class Reader:
    """A span model with its tokenizer and its pretrained parameters ({}: none)."""

    model: SpanFinder
    tokenizer: tokenizer.Tokenizer
    given: Params

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the batch fields that the model reads."""
        return ("tokens", "length", "types") if self.model.backbone.cfg.num_types else ("tokens", "length")


def config() -> Config:
    """Return the authors' recipe for BERT base."""
    return Config()


def demo() -> Config:
    """Return the preset for two cores and 300 CPU-seconds: the generated set, from scratch."""
    model = replace(encoder.bert(3, 96, 4, vocab_size=800, dropout=0.0), init_std=0.0)
    data = Data(world=people.Config(train=8000), window=squad.Cut(length=96, stride=32, question=24))
    # longest 30, 12 and 8 give an exact match of 0.51, 0.63 and 0.70 on the validation split (2,500 paragraphs, 4
    # epochs): so small a model finds the end of an answer but puts its start too early
    return Config(
        model=model,
        data=data,
        fit=loop.FitConfig(983, log_every=25, eval_every=250, save_every=250),  # 1.25 epochs
        learning_rate=1e-2,
        batch_size=32,
        optimizer=optimizers.Config(name="muon"),
        longest=8,
    )


def debug() -> Config:
    """Return four steps of a tiny model on a few paragraphs, some of whose questions have no answer."""
    world = people.Config(train=24, validation=6, test=6, unanswerable=0.2)
    data = Data(world=world, window=squad.Cut(length=64, stride=12, question=24))
    model = replace(encoder.tiny(), vocab_size=420)
    fit = loop.FitConfig(4, log_every=1, save_every=1)
    return Config(model=model, data=data, fit=fit, batch_size=32, learning_rate=1e-3)


def open_reader(cfg: Config, train: Sequence[Question], mesh: Mesh, *, resumed: bool = False) -> Reader:
    """Open a pretrained model; without one, train a tokenizer for a randomly initialised model."""
    length = cfg.data.window.length
    if cfg.init.from_ is None:
        contexts = dict.fromkeys(question.context for question in train)
        texts = [*contexts, *(question.text for question in train)]
        learnt = tokenizer.train_wordpiece(texts, cfg.model.vocab_size)
        return Reader(SpanFinder(encoder.Encoder(replace(cfg.model, max_length=length)), cfg.model.dropout), learnt, {})
    pretrained = language.load(cfg.init.source, **cfg.init.options, mesh=mesh, shapes=resumed)
    backbone, params = pretrained.backbone()
    if not isinstance(backbone, encoder.Encoder):
        raise ConfigError(
            f"{cfg.init.from_} is a {type(backbone).__name__}; question answering needs an encoder (BERT)"
        )
    if backbone.cfg.max_length < length:
        raise ConfigError(
            f"data.window.length {length} is more than the max_length {backbone.cfg.max_length} of {cfg.init.from_}"
        )
    assert pretrained.tokenizer is not None  # `load` refuses a checkpoint without one
    if isinstance(pretrained.module, SpanFinder):  # it has a trained head
        return Reader(pretrained.module, pretrained.tokenizer, pretrained.params)
    return Reader(SpanFinder(backbone, backbone.cfg.dropout), pretrained.tokenizer, {"backbone": params})


def load(cfg: Data, data_dir: Path) -> dict[str, tuple[Question, ...]]:
    """Read the splits of a folder, or write and read the generated set."""
    if cfg.path is not None:
        return squad.load(cfg.path)
    people.write(data_dir, cfg.world)
    return squad.load(data_dir)


def decode(cfg: Config, logits: Any, params: Params, windows: squad.Windows, mesh: Mesh) -> dict[str, reading.Decoded]:
    """Run the model on all windows and return each question's best spans."""
    with jax.set_mesh(mesh):
        stream = stage.one_pass(cfg, windows, mesh, rows=max(_ROWS, cfg.batch_size))
        both, _ = runner.predict(logits, params, stream, label="start")
    starts, ends = np.split(both, 2, axis=1)
    return reading.decode(starts, ends, windows, best=cfg.best, longest=cfg.longest)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, answer the other splits' questions, and write predictions.json, results.json and a picture."""
    mesh, key = stage.open_mesh(cfg), jax.random.key(cfg.seed)
    questions = load(cfg.data, cfg.data_dir or workdir / "data")
    reader = open_reader(cfg, questions["train"], mesh, resumed=resumes(workdir))
    reader.tokenizer.save(workdir / "tokenizer")
    windows = {
        split: squad.Windows(some, reader.tokenizer, cfg.data.window, name=split) for split, some in questions.items()
    }
    watched = "validation" if "validation" in windows else "test"
    inputs = (np.zeros((1, cfg.data.window.length), np.int32), np.ones(1, np.int32))

    def make_params() -> tuple[Params, Params]:
        fresh = state.init_params(reader.model, inputs, key, mesh)
        if not reader.given:
            return fresh, {}
        return surgery.load(fresh, reader.given, fresh=() if "head" in reader.given else ("head/.*",)), {}

    def logits(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        start_and_end = reader.model.apply({"params": params}, *(batch[name] for name in reader.inputs))
        return jnp.concatenate(start_and_end, axis=1)

    logits = jax.jit(logits)  # compiled once for all evaluations

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        decoded = decode(cfg, logits, now.params, windows[watched], mesh)
        scores = reading.score(questions[watched], reading.answers(decoded, threshold(questions[watched], decoded)))
        return {"exact": scores["all"].exact, "f1": scores["all"].f1}

    loss = span(reader.model.apply, reader.inputs)
    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, stage.rates(cfg, "linear"), make_params),
        make_params=make_params,
        batches=stage.batches(cfg, windows["train"]),
        mesh=mesh,
        model=reader.model,
        meta={"config": to_dict(cfg)},
        files=language.kept(reader.tokenizer),
        layout=state.layout(reader.model, inputs, mesh),
        validate=validate,
        split=watched,
        work=loop.Work(cfg.batch_size * cfg.data.window.length),
    )

    decoded = {split: decode(cfg, logits, done.params, windows[split], mesh) for split in windows if split != "train"}
    chosen = threshold(questions[watched], decoded[watched])
    predictions = {split: reading.answers(spans_of, chosen) for split, spans_of in decoded.items()}
    last = list(predictions)[-1]
    scored = {
        split: judge(questions[split], answers, cfg.seed)
        for split, answers in predictions.items()
        if squad.is_labelled(questions[split])
    }
    measured: dict[str, Any] = {
        split: {
            method: {kind: asdict(score) for kind, score in by_kind.items()} for method, by_kind in by_method.items()
        }
        for split, by_method in scored.items()
    }
    measured |= {"predictions_of": last, "steps": cfg.fit.num_steps, "parameters": tree.count(done.params)}
    measured |= {} if chosen is None else {"threshold": chosen, "threshold_chosen_on": watched}
    results.write(workdir / "results.json", measured)
    if jax.process_index() == 0:
        _write(workdir / "predictions.json", predictions[last])
        best = {name: [asdict(one) for one in question.candidates] for name, question in decoded[last].items()}
        _write(workdir / "nbest.json", best)
        draw(list(scored.values())[-1], workdir, list(scored)[-1])
    return measured


def threshold(questions: Sequence[Question], decoded: Mapping[str, reading.Decoded]) -> float | None:
    """Choose the no-answer threshold with the best F1; None if every question has an answer."""
    return None if all(question.answers for question in questions) else reading.best_threshold(questions, decoded)


def judge(questions: Sequence[Question], given: Mapping[str, str], seed: int) -> dict[str, dict[str, reading.Score]]:
    """Score the answers of the model and of the baselines, by kind of question."""
    by_method = {"this model": dict(given)}
    if all(question.same_type for question in questions if question.answers):
        by_method["first span of the type"] = spans.first_same_type(questions)
    by_method["random span of the length"] = spans.random_span(questions, seed=seed)
    by_method["nearest sentence"] = spans.nearest_sentence(questions)
    return {method: reading.score(questions, answers) for method, answers in by_method.items()}


def draw(scored: Mapping[str, Mapping[str, reading.Score]], workdir: Path, split: str) -> None:
    """Write the picture exact_match.png and the table results.md."""
    reading.bars(workdir / "exact_match.png", scored, title=f"Exact match on the {split} file")
    kinds = next(iter(scored.values()))
    rows = [
        {"method": method} | {kind: f"{scores[kind].exact:.3f} / {scores[kind].f1:.3f}" for kind in kinds}
        for method, scores in scored.items()
    ]
    heads = {kind: f"{kind} ({kinds[kind].count})" for kind in kinds}
    text = f"Exact match / F1 on {split}\n\n" + report.table(rows, {"method": "answers by", **heads})
    write_atomically(workdir / "results.md", text)
    print(text)


def _write(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    cli.main(run, {"default": config, "demo": demo, "debug": debug}, resumable=(*stage.RESUMABLE, "best", "longest"))
