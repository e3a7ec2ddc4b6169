"""Compare ways to train a text classifier on few labels, by a protocol that is fixed before the test split is read.

Every method chooses its learning rate from the same grid on the validation split, with a label budget and a seed that
are used for nothing else. It chooses by accuracy; or by macro-F1, where a model that always gives the most frequent
class has a good accuracy. Each run reads the test split once, at the end, and every budget and seed is reported. TF-IDF
with logistic regression gets the same labels.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fm_jax.core import tree
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.python_docs.docstrings import Examples
from fm_jax.data.text.labelled import Task
from fm_jax.evals import metrics
from fm_jax.evals.baselines.tfidf import tfidf_logistic
from fm_jax.evals.report import report, results
from fm_jax.tasks import text_classifier
from fm_jax.tasks.text_classifier import METHODS, Method, Setup
from fm_jax.train import log

Drawn = dict[tuple[int, int], Examples]  # (labels per class, seed) -> training texts
_BASELINE = "tfidf"


@dataclass(frozen=True)
class Protocol:
    """What is compared, and on how many labels."""

    methods: tuple[Method, ...] = METHODS
    budgets: tuple[int, ...] = (4, 8, 32)  # labelled examples per class; summaries use the first
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_labels: int = 16  # labelled examples per class in the runs that choose the learning rate
    tuning_seed: int = 100  # seed of those runs
    grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # learning rates, the same for every method
    criterion: Literal["accuracy", "macro_f1"] = "accuracy"  # of the validation split, by which a rate is chosen
    validation_texts: int = 0  # texts drawn of the validation split; 0: all
    test_texts: int = 0  # texts drawn of the test split, the same for every run; 0: all

    def __post_init__(self) -> None:
        """Refuse a comparison of nothing, and test runs with the labels that chose the learning rate."""
        for name in ("methods", "budgets", "seeds", "grid"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one")
        check_least(self, tuning_labels=1, tuning_seed=0, validation_texts=0, test_texts=0)
        if min(self.budgets) < 1 or min(self.seeds) < 0:
            raise ConfigError(f"budgets {self.budgets} must be numbers ≥ 1, seeds {self.seeds} numbers ≥ 0")
        if len(set(self.seeds)) < max(len(self.seeds), 2):
            raise ConfigError(f"seeds {self.seeds} must be at least two different ones; one shows no spread")
        if self.tuning_seed in self.seeds:
            raise ConfigError(f"tuning_seed {self.tuning_seed} is also one of seeds; its labels must be used once")


def compare(cfg: Protocol, setup: Setup, task: Task, parts: Path) -> dict[str, Any]:
    """Tune each method on the validation split, then train and test it for every budget and seed.

    Args:
        cfg: the protocol.
        setup: model and settings of all runs.
        task: training, validation and test texts.
        parts: folder of the finished methods' results, which a later call with the same folder does not repeat.

    Returns:
        For every method and "tfidf": accuracy_mean, accuracy_spread (half of the 95 % interval over seeds),
        macro_f1_mean and calibration_error_mean at the first budget; "runs"; for a method its learning_rate,
        trained_parameters and seconds. For "majority": accuracy_mean of the test split's most frequent class.
    """
    validation = _some(task.validation, cfg.validation_texts)
    test = _some(task.test, cfg.test_texts)
    drawn = {
        (budget, seed): docstrings.few(task.train, budget, seed=seed) for budget in cfg.budgets for seed in cfg.seeds
    }
    tuning = docstrings.few(task.train, cfg.tuning_labels, seed=cfg.tuning_seed)
    compared: dict[str, Any] = {}
    for method in cfg.methods:
        one = partial(_method, cfg, setup, method, (tuning, validation, test), drawn, parts)
        compared[method] = results.once(parts / f"{method}.json", one)
        mean, spread = compared[method]["accuracy_mean"], compared[method]["accuracy_spread"]
        labels = compared[method]["labels"]
        print(f"{method}: test accuracy {mean:.3f} ± {spread:.3f} with {labels} labels per class", flush=True)
    baseline = partial(_tfidf, cfg, validation, test, drawn)
    compared[_BASELINE] = results.once(parts / f"{_BASELINE}.json", baseline)
    counts = np.bincount(test.labels, minlength=len(task.classes))
    return compared | {"majority": {"accuracy_mean": float(counts.max() / counts.sum())}}


def table(compared: Mapping[str, Any]) -> str:
    """Return one row per method: test accuracy per budget (mean ± half its interval), other metrics and cost."""
    rows = []
    for name in _order(compared):
        entry = compared[name]
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


def draw(path: Path, compared: Mapping[str, Any], title: str) -> None:
    """Draw test accuracy over labels per class."""
    report.accuracy_over_labels(
        path,
        {name: _by_budget(compared[name]["runs"]) for name in _order(compared)},
        baseline={"most frequent class": compared["majority"]["accuracy_mean"]},
        title=title,
    )


def _method(
    cfg: Protocol,
    setup: Setup,
    method: Method,
    splits: tuple[Examples, Examples, Examples],
    drawn: Drawn,
    workdir: Path,
) -> dict[str, Any]:
    """Choose a learning rate on the validation split, then measure the test accuracy of every budget and seed."""
    # short runs, of which nothing is stored
    fit = partial(setup.fit, method, workdir=workdir, meta={}, store=False, writer=log.Tee([]))
    names = ("tuning", "validation", "test")
    tuning, validation, test = (setup.rows(split, name) for split, name in zip(splits, names, strict=True))
    tried, started = {}, time.perf_counter()
    for rate in cfg.grid if len(cfg.grid) > 1 else ():
        params, _ = fit(rate, tuning, cfg.tuning_seed)
        tried[rate] = text_classifier.scores(setup.probabilities(params, validation), validation)[cfg.criterion]
    best = max(tried, key=lambda rate: tried[rate], default=cfg.grid[0])
    runs: list[dict[str, Any]] = []
    tuned = time.perf_counter()
    for (budget, seed), examples in drawn.items():
        params, trained = fit(best, setup.rows(examples, "train"), seed)
        scored = text_classifier.scores(setup.probabilities(params, test), test)
        runs.append({"labels": budget, "seed": seed} | scored)
    return _summary(runs, cfg.budgets[0]) | {
        "trained_parameters": tree.count(trained),
        "learning_rate": best,
        f"validation_{cfg.criterion}_by_rate": {str(rate): score for rate, score in tried.items()},
        "seconds_all_runs": time.perf_counter() - tuned,
        "seconds_tuning": tuned - started,
        "runs": runs,
    }


def _tfidf(cfg: Protocol, validation: Examples, test: Examples, drawn: Drawn) -> dict[str, Any]:
    """Fit the baseline, TF-IDF and logistic regression, to the same draws; it is tuned on the validation split."""
    runs = []
    for (budget, seed), examples in drawn.items():
        train, valid, held_out = ((_joined(part), part.labels.tolist()) for part in (examples, validation, test))
        fitted = tfidf_logistic(*train, *valid, *held_out, criterion=cfg.criterion)
        scored = {"accuracy": fitted["test_accuracy"], "macro_f1": fitted["test_macro_f1"]}
        runs.append({"labels": budget, "seed": seed} | scored)
    return _summary(runs, cfg.budgets[0]) | {"runs": runs}


def _some(examples: Examples, count: int) -> Examples:
    """Draw `count` examples, the same for every protocol; all for 0, or if there are no more."""
    if not 0 < count < len(examples):
        return examples
    return examples.take(np.sort(np.random.default_rng(0).permutation(len(examples))[:count]))


def _joined(examples: Examples) -> tuple[str, ...]:
    """Return the texts; the two texts of a pair as one."""
    if not examples.second:
        return examples.texts
    return tuple(f"{first}\n{second}" for first, second in zip(examples.texts, examples.second, strict=True))


def _summary(runs: list[dict[str, Any]], labels: int) -> dict[str, float]:
    """Return the means over seeds at one budget, and half the width of the accuracy's 95 % interval."""
    chosen = [run for run in runs if run["labels"] == labels]
    interval = metrics.mean_interval([run["accuracy"] for run in chosen])
    means = {
        f"{name}_mean": float(np.mean([run[name] for run in chosen]))
        for name in ("accuracy", "macro_f1", "calibration_error")
        if name in chosen[0]
    }
    return means | {"accuracy_spread": (interval.high - interval.low) / 2, "labels": labels}


def _by_budget(runs: list[dict[str, Any]]) -> dict[int, list[float]]:
    by_budget: dict[int, list[float]] = {}
    for run in runs:
        by_budget.setdefault(run["labels"], []).append(run["accuracy"])
    return by_budget


def _order(compared: Mapping[str, Any]) -> list[str]:
    """Return the names of everything that has runs: the methods, then the baseline."""
    return [name for name in (*METHODS, _BASELINE) if name in compared]
