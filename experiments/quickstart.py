"""Pretrain a small language model, finetune it by five methods, evaluate it and generate text, on any machine.

Papers: Radford et al. 2018 and 2019 (pretrain and finetune a decoder), Hu et al. 2022 (LoRA).
Idea: every Python contains megabytes of English and code: its reference manual, and the docstrings and comments of its
library. A decoder is pretrained on them and compared with byte n-grams and xz on the same split. Then it is finetuned
with few labels on a classification task: which of ten packages does a docstring belong to? Package names are masked.

    ./launch.sh local experiments.quickstart                                        # two cores, at most 8 minutes
    ./launch.sh local experiments.quickstart --config demo --workdir runs/demo      # at most 30 minutes

The protocol was fixed before the test split was read: the config has the task, label budgets, seeds and grid. Every
method chooses its learning rate from the same grid by validation accuracy, with a label budget and a seed that are used
for nothing else. Each run reads the test split once, at the end, and every budget and seed is reported.
Expected: the tables in `experiments/README.md`, with their baselines.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.language import lm_pretrain
from fm_jax import cli
from fm_jax.core import tree
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import documents, labelled
from fm_jax.evals import metrics
from fm_jax.evals.baselines import ngram
from fm_jax.evals.baselines.tfidf import tfidf_logistic
from fm_jax.evals.report import report, results
from fm_jax.generate import sample
from fm_jax.generate.text import text as write_text
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language import decoder
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import language, text_classifier
from fm_jax.tasks.text_classifier import METHODS, Method, Setup
from fm_jax.train import log, loop, stage

Drawn = dict[tuple[int, int], docstrings.Examples]  # (labels per class, seed) -> training texts
ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3, "fivegram": 5}
PROMPTS = ("Return the", "The with statement is used to", "Raises ValueError if")


@dataclass(frozen=True)
class Config:
    """Pretraining, finetuning and the protocol of the comparison."""

    pretrain: lm_pretrain.Config
    finetune: text_classifier.Config  # method, learning rate and seed are set by the comparison
    budgets: tuple[int, ...] = (4, 8, 32)  # labelled examples per class; summaries use the first
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_labels: int = 16  # labelled examples per class in the runs that choose the learning rate
    tuning_seed: int = 100  # seed of those runs
    grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # learning rates, the same for every method
    new_tokens: int = 40

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        check_least(self, tuning_labels=1, tuning_seed=0, new_tokens=1)
        if not self.budgets or not self.seeds or min(self.budgets) < 1 or min(self.seeds) < 0:
            raise ConfigError(f"budgets {self.budgets} must be one or more numbers ≥ 1, seeds {self.seeds} ≥ 0")


def model(vocab_size: int) -> decoder.Config:
    """Return the decoder of both presets: 4 layers of width 128, context 128."""
    base = decoder.gpt(4, 128, 4, vocab_size=vocab_size, max_length=128)
    # rematerialisation saves memory traffic: a step takes 162 ms instead of 218 on two cores
    return replace(base, init_std=0.0, remat="dots")


def config() -> Config:
    """Return the preset for two cores and eight minutes."""
    fit = loop.FitConfig(700, log_every=10, eval_every=175, save_every=175)
    # validation bits per byte after 300 steps: Muon 2.24, the better of two AdamW settings 2.73
    muon = optimizers.Config(name="muon")
    pretrain = lm_pretrain.Config(
        model=model(2048),
        fit=fit,
        learning_rate=1e-2,
        batch_size=16,
        schedule="linear",
        warmup=0.05,
        optimizer=muon,
    )
    finetune = text_classifier.Config(fit=loop.FitConfig(80), batch_size=16, length=48, frozen_layers=2)
    return Config(pretrain, finetune)


def demo() -> Config:
    """Return the preset for two cores and half an hour."""
    fit = loop.FitConfig(2500, log_every=20, eval_every=250, save_every=250)
    base = config()
    return replace(
        base,
        pretrain=replace(base.pretrain, fit=fit),
        finetune=replace(base.finetune, fit=loop.FitConfig(120), length=64),
        budgets=(4, 8, 16, 32),
    )


def debug() -> Config:
    """Return two steps of every stage, on three small packages."""
    tiny = lm_pretrain.debug()
    finetune = text_classifier.Config(fit=loop.FitConfig(2), batch_size=8, length=16, frozen_layers=1)
    return Config(tiny, finetune, budgets=(2,), seeds=(0, 1), tuning_labels=2, grid=(1e-3,), new_tokens=4)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Run all stages and return the content of results.json."""
    done = workdir / "results.json"
    if done.exists():
        print(f"already done: the results are in {done}; use another --workdir to run again")
        return results.read(done)
    data_dir, parts = workdir / "data", workdir / "parts"  # finished parts are kept, so a stopped run resumes

    measured = lm_pretrain.run(replace(cfg.pretrain, data_dir=data_dir), workdir / "pretrain")
    bits = _once(parts / "baselines.json", lambda: baselines(cfg, data_dir))
    everything: dict[str, Any] = {"pretrain": measured | {"baselines_bits_per_byte": bits}}

    start = language.load(workdir / "pretrain")
    task = labelled.load(labelled.Config(), data_dir)
    setup = Setup(start, task.classes, cfg.finetune, stage.open_mesh(cfg.finetune))
    everything["finetune"] = compare(cfg, setup, task, parts)
    everything["samples"] = _once(parts / "samples.json", lambda: samples(cfg, start))["samples"]
    everything["seconds"] = seconds(everything["finetune"], workdir)

    write_report(everything, workdir)
    results.write(done, everything)
    print((workdir / "results.md").read_text())
    return everything


def baselines(cfg: Config, data_dir: Path) -> dict[str, float]:
    """Return bits per byte of smoothed byte n-grams and of xz on the model's validation split."""
    text = {}
    for split in ("train", "validation"):
        texts = documents.documents(cfg.pretrain.data, split, data_dir)
        text[split] = b"".join(texts[index].encode() for index in range(len(texts)))
    by_order = ngram.bits_per_byte_by_order(text["train"], text["validation"], tuple(ORDERS.values()))
    bits = {name: by_order[order] for name, order in ORDERS.items()}
    return bits | {"xz": ngram.xz_bits_per_byte(text["train"], text["validation"])}


def compare(cfg: Config, setup: Setup, task: labelled.Task, parts: Path) -> dict[str, Any]:
    """Tune each method on the validation split, then train and test it for every budget and seed."""
    drawn = {
        (budget, seed): docstrings.few(task.train, budget, seed=seed) for budget in cfg.budgets for seed in cfg.seeds
    }
    compared: dict[str, Any] = {}
    for method in METHODS:
        part = parts / f"{method}.json"
        compared[method] = one = _once(part, partial(compare_method, cfg, setup, task, method, drawn, parts))
        mean, spread = one["accuracy_mean"], one["accuracy_spread"]
        print(f"{method}: test accuracy {mean:.3f} ± {spread:.3f} with {one['labels']} labels per class", flush=True)
    compared["tfidf"] = _once(parts / "tfidf.json", lambda: compare_tfidf(cfg, task, drawn))
    counts = np.bincount(task.test.labels, minlength=len(task.classes))
    return compared | {"majority": {"accuracy_mean": float(counts.max() / counts.sum())}}


def compare_method(
    cfg: Config, setup: Setup, task: labelled.Task, method: Method, drawn: Drawn, workdir: Path
) -> dict[str, Any]:
    """Choose a learning rate by validation accuracy, then measure the test accuracy of every budget and seed."""
    # short runs, of which nothing is stored
    fit = partial(setup.fit, method, workdir=workdir, meta={}, store=False, writer=log.Tee([]))
    validation, test = setup.rows(task.validation, "validation"), setup.rows(task.test, "test")
    tuning = setup.rows(docstrings.few(task.train, cfg.tuning_labels, seed=cfg.tuning_seed), "tuning")
    tried, started = {}, time.perf_counter()
    for rate in cfg.grid:
        params, _ = fit(rate, tuning, cfg.tuning_seed)
        tried[rate] = text_classifier.scores(setup.probabilities(params, validation), validation)["accuracy"]
    best = max(tried, key=lambda rate: tried[rate])
    runs: list[dict[str, Any]] = []
    tuned = time.perf_counter()
    for (budget, seed), examples in drawn.items():
        params, trained = fit(best, setup.rows(examples, "train"), seed)
        scored = text_classifier.scores(setup.probabilities(params, test), test)
        runs.append({"labels": budget, "seed": seed} | scored)
    return summary(runs, cfg.budgets[0]) | {
        "trained_parameters": tree.count(trained),
        "learning_rate": best,
        "validation_accuracy_by_rate": {str(rate): score for rate, score in tried.items()},
        "seconds_all_runs": time.perf_counter() - tuned,
        "seconds_tuning": tuned - started,
        "runs": runs,
    }


def compare_tfidf(cfg: Config, task: labelled.Task, drawn: Drawn) -> dict[str, Any]:
    """Fit the baseline, TF-IDF and logistic regression, to the same draws; it is tuned on the validation split."""
    runs = []
    for (budget, seed), examples in drawn.items():
        train, validation, test = (
            (split.texts, split.labels.tolist()) for split in (examples, task.validation, task.test)
        )
        fitted = tfidf_logistic(*train, *validation, *test)
        scored = {"accuracy": fitted["test_accuracy"], "macro_f1": fitted["test_macro_f1"]}
        runs.append({"labels": budget, "seed": seed} | scored)
    return summary(runs, cfg.budgets[0]) | {"runs": runs}


def samples(cfg: Config, start: Pretrained) -> dict[str, Any]:
    """Generate text with the pretrained model from a few prompts."""
    assert start.tokenizer is not None  # every run has one
    texts = write_text(
        start.module,
        start.params,
        start.tokenizer,
        PROMPTS,
        max_new_tokens=cfg.new_tokens,
        cfg=sample.Config(temperature=0.8, top_p=0.95),
        key=jax.random.key(cfg.pretrain.seed),
        eos_id=start.tokenizer.end_id,
        start_id=start.tokenizer.end_id,  # in training every document began with it
    )
    return {"samples": [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts, strict=True)]}


def seconds(finetune: dict[str, Any], workdir: Path) -> dict[str, float]:
    """Return training times: pretraining from the first to the last line of its log, and each method."""
    rows = log.read(workdir / "pretrain" / "metrics.jsonl")
    runs = {name: finetune[name]["seconds_tuning"] + finetune[name]["seconds_all_runs"] for name in METHODS}
    return {"pretrain": rows[-1]["time"] - rows[0]["time"]} | runs


def summary(runs: list[dict[str, Any]], labels: int) -> dict[str, float]:
    """Return the means over seeds at one budget, and half the width of the accuracy's 95 % interval."""
    chosen = [run for run in runs if run["labels"] == labels]
    interval = metrics.mean_interval([run["accuracy"] for run in chosen])
    means = {
        f"{name}_mean": float(np.mean([run[name] for run in chosen]))
        for name in ("accuracy", "macro_f1", "calibration_error")
        if name in chosen[0]
    }
    return means | {"accuracy_spread": (interval.high - interval.low) / 2, "labels": labels}


def write_report(everything: dict[str, Any], workdir: Path) -> None:
    """Write the pictures, and the tables in results.md."""
    pretrain, finetune = everything["pretrain"], everything["finetune"]
    curve = log.read(workdir / "pretrain" / "metrics.jsonl")
    report.loss_curves(
        workdir / "loss.png",
        {
            name: ([row["step"] for row in curve if key in row], [row[key] for row in curve if key in row])
            for name, key in (("train", "train/loss"), ("validation", "validation/nll"))
        },
        title="Pretraining on Python's documentation",
    )
    bits = dict(pretrain["baselines_bits_per_byte"]) | {"this model": pretrain["bits_per_byte"]}
    report.bits_per_byte_bars(
        workdir / "bits_per_byte.png",
        dict(sorted(bits.items(), key=lambda item: -item[1])),
        highlight=("this model",),
        title="Validation bits per byte (lower is better)",
    )
    report.accuracy_over_labels(
        workdir / "accuracy.png",
        {name: _by_budget(finetune[name]["runs"]) for name in (*METHODS, "tfidf")},
        baseline={"most frequent class": finetune["majority"]["accuracy_mean"]},
        title="Docstring classification: test accuracy with few labels",
    )
    columns = {"model": "language model", "bits": "validation bits per byte"}
    rows = [{"model": name, "bits": round(value, 3)} for name, value in sorted(bits.items(), key=lambda item: -item[1])]
    lines = [report.table(rows, columns), "", _finetune_table(finetune), ""]
    lines += [f"> **{sample['prompt']}**{' '.join(sample['text'].split())!r}\n" for sample in everything["samples"]]
    (workdir / "results.md").write_text("\n".join(lines) + "\n")


def _by_budget(runs: list[dict[str, Any]]) -> dict[int, list[float]]:
    by_budget: dict[int, list[float]] = {}
    for run in runs:
        by_budget.setdefault(run["labels"], []).append(run["accuracy"])
    return by_budget


def _finetune_table(finetune: dict[str, Any]) -> str:
    """Return one row per method: test accuracy per budget (mean ± half its interval), other metrics and cost."""
    rows = []
    for name in (*METHODS, "tfidf"):
        entry = finetune[name]
        row: dict[str, Any] = {"method": name}
        for budget, values in _by_budget(entry["runs"]).items():
            interval = metrics.mean_interval(values)
            row[f"{budget} per class"] = f"{interval.estimate:.3f} ± {(interval.high - interval.low) / 2:.3f}"
        row["macro-F1"] = entry["macro_f1_mean"]
        row["calibration error"] = entry.get("calibration_error_mean")
        row["trained"] = entry.get("trained_parameters")
        if "seconds_all_runs" in entry:
            row["seconds per run"] = entry["seconds_all_runs"] / len(entry["runs"])
        rows.append(row)
    return report.table(rows, list(rows[0]))


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of `path` from an earlier start of this run, or make and save it."""
    if not path.exists():
        results.write(path, make())
    return results.read(path)


if __name__ == "__main__":
    cli.main(run, {"default": config, "demo": demo, "debug": debug})
