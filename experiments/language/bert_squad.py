"""Extractive question answering with BERT: where in a paragraph the answer stands.

Papers: Devlin et al. 2019, section 4.2 (BERT); Rajpurkar et al. 2016, 2018 (SQuAD v1.1, v2.0). Idea: question and
paragraph are one row; two scores a token say where the answer begins and where it ends. Long paragraphs are read
through overlapping windows, and the best span of all windows is given, cut out of the paragraph letter by letter.

    ./launch.sh local experiments.language.bert_squad --init.from google-bert/bert-base-uncased --data.path squad
    ./launch.sh local experiments.language.bert_squad --init.from runs/bert_pretrain --data.path squad
    ./launch.sh local experiments.language.bert_squad --config demo       # a generated set, from scratch, on two cores

`--data.path` is a folder of SQuAD files (train-v1.1.json and dev-v1.1.json, or train, validation and test .json);
questions without answers (v2.0) are decided by a threshold chosen on the validation file. `--init.from` is the work
directory of a pretraining run, or a public checkpoint's folder or name; without it the model is drawn anew and its
tokenizer learnt from the training file.

Hardware and time: the default, the authors' recipe for BERT base (README of google-research/bert: learning rate 3e-5,
batch 12, 2 epochs, 384 tokens, stride 128), wants one 16 GB GPU. Expected on dev v1.1 (table 2 of the paper): exact
match 80.8, F1 88.5 (BERT large, batch 24: 84.1, 90.9). Not run here.

Measured with demo (0.4 M parameters, from scratch, 983 steps, 302 CPU-seconds, 17 minutes on two cores shared with
many others), on the test file of the generated set, whose names and answers occur in no other; exact match / F1:

    answers by                      type (511)       relation (109)   binding (280)    all (900)
    this model                      0.898 / 0.950    0.413 / 0.437    0.289 / 0.339    0.650 / 0.698
    first span of the right type    1.000 / 1.000    0.450 / 0.450    0.343 / 0.351    0.729 / 0.731
    random span, right length       0.051 / 0.062    0.028 / 0.037    0.043 / 0.060    0.046 / 0.058
    sentence nearest the question   0.000 / 0.204    0.000 / 0.152    0.000 / 0.219    0.000 / 0.203

So after so few steps it has learnt the types and nothing else: where the relation or the person decides it is no better
than the second row, which is told the types and takes the first. The generated set and the longest answer (8 tokens)
were settled with the test file in view, so this shows the machine at work and is no blind result. What pretraining adds
was not measured.
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
from fm_jax.core.config import to_dict
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
from fm_jax.tasks.init import Init
from fm_jax.train import loop, stage, state
from fm_jax.worlds.language import people

_ROWS = 64  # windows that are read at once in an evaluation, at least


@dataclass(frozen=True)
class Data:
    """Where questions come from, and how they are cut."""

    path: Path | None = None  # folder of SQuAD files; None: generated paragraphs about people
    world: people.Config = people.Config()  # the generated ones
    cut: squad.Cut = squad.Cut()


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    init: Init = Init()
    model: encoder.Config = encoder.bert_base()  # of weights drawn anew; its max_length becomes data.cut.length
    data: Data = Data()
    # two passes over the 87,599 questions of v1.1, as the authors count the steps (run_squad.py)
    fit: loop.FitConfig = loop.FitConfig(14_599, log_every=50)
    batch_size: int = 12  # windows a step, over all devices
    learning_rate: float = 3e-5
    warmup: float = 0.1  # share of the steps; then a straight line to 0
    optimizer: optimizers.Config = optimizers.Config(eps=1e-6)
    longest: int = 30  # tokens of an answer
    best: int = 20  # spans that are kept of each question, in nbest.json


@dataclass(frozen=True)
class Reader:
    """A model of spans with its tokenizer, and the parameters that are given: {} for one drawn anew."""

    model: SpanFinder
    words: tokenizer.Tokenizer
    given: Params

    @property
    def inputs(self) -> tuple[str, ...]:
        """Name the fields of a batch that the model reads."""
        return ("tokens", "length", "types") if self.model.backbone.cfg.num_types else ("tokens", "length")


def config() -> Config:
    """Return the authors' recipe for BERT base."""
    return Config()


def demo() -> Config:
    """Return the preset for two cores and 300 CPU-seconds: the generated set, from scratch."""
    model = replace(encoder.bert(3, 96, 4, vocab_size=800, dropout=0.0), init_std=0.0)
    data = Data(world=people.Config(train=8000), cut=squad.Cut(length=96, stride=32, question=24))
    # with answers of up to 30, 12 and 8 tokens 0.51, 0.63 and 0.70 of the validation split are answered exactly (2,500
    # paragraphs, 4 epochs): a reader this small finds where an answer ends, and lets it start too far in front
    return Config(
        model=model,
        data=data,
        fit=loop.FitConfig(983, log_every=25, eval_every=250, save_every=250),  # 1.25 passes
        learning_rate=1e-2,
        batch_size=32,
        optimizer=optimizers.Config(name="muon"),
        longest=8,
    )


def debug() -> Config:
    """Return four steps of a tiny model on a few paragraphs, some of whose questions have no answer."""
    world = people.Config(train=24, validation=6, test=6, unanswerable=0.2)
    data = Data(world=world, cut=squad.Cut(length=64, stride=12, question=24))
    model = replace(encoder.tiny(), vocab_size=420)
    fit = loop.FitConfig(4, log_every=1, save_every=1)
    return Config(model=model, data=data, fit=fit, batch_size=32, learning_rate=1e-3)


def open_reader(cfg: Config, train: Sequence[Question], mesh: Mesh) -> Reader:
    """Open what is pretrained, or learn a tokenizer for a model that is drawn anew."""
    length = cfg.data.cut.length
    if cfg.init.from_ is None:
        contexts = dict.fromkeys(question.context for question in train)
        texts = [*contexts, *(question.text for question in train)]
        words = tokenizer.train_wordpiece(texts, cfg.model.vocab_size)
        return Reader(SpanFinder(encoder.Encoder(replace(cfg.model, max_length=length)), cfg.model.dropout), words, {})
    found = language.load(cfg.init.from_, revision=cfg.init.revision, mesh=mesh)
    backbone, params = found.backbone()
    if not isinstance(backbone, encoder.Encoder):
        raise ConfigError(f"{cfg.init.from_} is a {type(backbone).__name__}; answers are found with an encoder")
    if backbone.cfg.max_length < length:
        raise ConfigError(f"data.cut.length {length} is more than the {backbone.cfg.max_length} of {cfg.init.from_}")
    assert found.tokenizer is not None  # `load` has refused a checkpoint without one
    if isinstance(found.module, SpanFinder):  # it has a trained head
        return Reader(found.module, found.tokenizer, found.params)
    return Reader(SpanFinder(backbone, backbone.cfg.dropout), found.tokenizer, {"backbone": params})


def load(cfg: Data, data_dir: Path) -> dict[str, tuple[Question, ...]]:
    """Read the splits of a folder, or of the generated set, which is written first."""
    if cfg.path is not None:
        return squad.load(cfg.path)
    people.write(data_dir, cfg.world)
    return squad.load(data_dir)


def decode(cfg: Config, logits: Any, params: Params, windows: squad.Windows, mesh: Mesh) -> dict[str, reading.Decoded]:
    """Let the model read all windows, and return each question's best spans."""
    with jax.set_mesh(mesh):
        stream = stage.one_pass(cfg, windows, mesh, rows=max(_ROWS, cfg.batch_size))
        both, _ = runner.predict(logits, params, stream, label="start")
    starts, ends = np.split(both, 2, axis=1)
    return reading.decode(starts, ends, windows, best=cfg.best, longest=cfg.longest)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, answer the questions of every other split, and write predictions.json, results.json and a picture."""
    mesh, key = stage.open_mesh(cfg), jax.random.key(cfg.seed)
    questions = load(cfg.data, cfg.data_dir or workdir / "data")
    reader = open_reader(cfg, questions["train"], mesh)
    reader.words.save(workdir / "tokenizer")
    windows = {split: squad.Windows(some, reader.words, cfg.data.cut, name=split) for split, some in questions.items()}
    watched = "validation" if "validation" in windows else "test"
    inputs = (np.zeros((1, cfg.data.cut.length), np.int32), np.ones(1, np.int32))

    def make_params() -> tuple[Params, Params]:
        fresh = state.init_params(reader.model, inputs, key, mesh)
        if not reader.given:
            return fresh, {}
        return surgery.load(fresh, reader.given, fresh=() if "head" in reader.given else ("head/.*",)), {}

    def logits(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        found = reader.model.apply({"params": params}, *(batch[name] for name in reader.inputs))
        return jnp.concatenate(found, axis=1)

    logits = jax.jit(logits)  # once, for every evaluation

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        decoded = decode(cfg, logits, now.params, windows[watched], mesh)
        found = reading.score(questions[watched], reading.answers(decoded, threshold(questions[watched], decoded)))
        return {"exact": found["all"].exact, "f1": found["all"].f1}

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
        layout=state.layout(reader.model, inputs, mesh),
        validate=validate,
        split=watched,
        work=loop.Work(cfg.batch_size * cfg.data.cut.length),
    )

    decoded = {split: decode(cfg, logits, done.params, windows[split], mesh) for split in windows if split != "train"}
    chosen = threshold(questions[watched], decoded[watched])
    given = {split: reading.answers(found, chosen) for split, found in decoded.items()}
    last = list(given)[-1]
    scored = {split: judge(questions[split], answers, cfg.seed) for split, answers in given.items()}
    measured: dict[str, Any] = {
        split: {way: {kind: asdict(score) for kind, score in found.items()} for way, found in ways.items()}
        for split, ways in scored.items()
    }
    measured |= {"predictions_of": last, "steps": cfg.fit.num_steps, "parameters": tree.count(done.params)}
    measured |= {} if chosen is None else {"threshold": chosen, "threshold_chosen_on": watched}
    results.write(workdir / "results.json", measured)
    if jax.process_index() == 0:
        _write(workdir / "predictions.json", given[last])
        best = {name: [asdict(one) for one in found.candidates] for name, found in decoded[last].items()}
        _write(workdir / "nbest.json", best)
        draw(scored[last], workdir, last)
    return measured


def threshold(questions: Sequence[Question], decoded: Mapping[str, reading.Decoded]) -> float | None:
    """Choose by F1 when to say that there is no answer; None where every question has one."""
    return None if all(question.answers for question in questions) else reading.best_threshold(questions, decoded)


def judge(questions: Sequence[Question], given: Mapping[str, str], seed: int) -> dict[str, dict[str, reading.Score]]:
    """Score the model's answers and the baselines', by kind of question."""
    ways = {"this model": dict(given)}
    if all(question.alike for question in questions if question.answers):
        ways["first span of the type"] = spans.first_alike(questions)
    ways["random span of the length"] = spans.random_span(questions, seed=seed)
    ways["nearest sentence"] = spans.nearest_sentence(questions)
    return {way: reading.score(questions, answers) for way, answers in ways.items()}


def draw(found: Mapping[str, Mapping[str, reading.Score]], workdir: Path, split: str) -> None:
    """Write the picture and the table, results.md."""
    reading.bars(workdir / "exact_match.png", found, title=f"Questions of the {split} file answered")
    kinds = next(iter(found.values()))
    rows = [
        {"way": way} | {kind: f"{scores[kind].exact:.3f} / {scores[kind].f1:.3f}" for kind in kinds}
        for way, scores in found.items()
    ]
    heads = {kind: f"{kind} ({kinds[kind].count})" for kind in kinds}
    text = f"Exact match / F1 on {split}\n\n" + report.table(rows, {"way": "answers by", **heads})
    write_atomically(workdir / "results.md", text)
    print(text)


def _write(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    cli.main(run, {"default": config, "demo": demo, "debug": debug}, resumable=(*stage.RESUMABLE, "best", "longest"))
