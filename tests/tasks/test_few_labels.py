from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.data.python_docs.docstrings import Examples
from fm_jax.evals.baselines.tfidf import tfidf_logistic
from fm_jax.tasks import few_labels
from fm_jax.tasks.few_labels import Protocol
from tests.close import close


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budgets": ()}, "budgets is empty"),
        ({"methods": ()}, "methods is empty"),
        ({"budgets": (4, 0)}, "budgets .* must be numbers ≥ 1"),
        ({"test_texts": -1}, "test_texts must be at least 0"),
        ({"seeds": (1, 1)}, "at least two different"),
        ({"tuning_seed": 2}, "tuning_seed 2 is also one of seeds"),
    ],
)
def test_a_protocol_that_compares_nothing_or_reuses_labels_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Protocol(**fields)


def examples(count: int, *, second: tuple[str, ...] = ()) -> Examples:
    texts = tuple(f"text {index}" for index in range(count))
    return Examples(texts, np.arange(count, dtype=np.int32) % 2, ("",) * count, ("no", "yes"), second)


def test_a_drawn_part_of_a_split_is_always_the_same_and_keeps_texts_with_labels() -> None:
    whole = examples(50)
    some = few_labels._some(whole, 10)
    assert len(set(some.texts)) == 10
    assert some.texts == few_labels._some(whole, 10).texts
    assert [int(text.split()[1]) % 2 for text in some.texts] == some.labels.tolist()
    assert few_labels._some(whole, 0) is few_labels._some(whole, 50) is whole


class ConstantOrWeak:
    """Stands for a Setup: at rate 1 its model always says the frequent class, at rate 2 it knows something of both."""

    def rows(self, split: Examples, name: str) -> list[dict[str, int]]:
        return [{"label": int(label)} for label in split.labels]

    def fit(self, method: str, rate: float, train: Examples, seed: int, **settings: object) -> tuple[float, dict]:
        return rate, {}

    def probabilities(self, rate: float, rows: list[dict[str, int]]) -> np.ndarray:
        labels = np.array([row["label"] for row in rows])
        right = labels == 0 if rate == 1 else np.arange(len(labels)) % 10 < 7
        return np.stack([labels == 0, labels == 1], axis=1) == right[:, None]


@pytest.mark.parametrize(("criterion", "rate"), [("accuracy", 1), ("macro_f1", 2)])
def test_the_rate_is_chosen_by_the_criterion(criterion: Literal["accuracy", "macro_f1"], rate: float) -> None:
    labels = (np.arange(100) % 5 == 4).astype(np.int32)  # the first class has 80 of 100
    whole = replace(examples(100), labels=labels)
    cfg = Protocol(("probe",), (4,), (0, 1), grid=(1, 2), criterion=criterion)
    drawn = {(4, seed): whole for seed in cfg.seeds}
    chosen = few_labels._method(cfg, ConstantOrWeak(), "probe", (whole,) * 3, drawn, Path())  # type: ignore[arg-type]
    assert chosen["learning_rate"] == rate
    assert set(chosen[f"validation_{criterion}_by_rate"]) == {"1", "2"}


@pytest.mark.parametrize("criterion", ["accuracy", "macro_f1"])
def test_the_baseline_is_chosen_by_the_criterion(criterion: Literal["accuracy", "macro_f1"]) -> None:
    texts = [f"word{index % 7} {'odd' if index % 3 == 0 else 'even'}" for index in range(60)]
    labels = [int(index % 5 == 0) for index in range(60)]
    fitted = tfidf_logistic(texts, labels, texts, labels, texts, labels, criterion=criterion)
    assert fitted[f"valid_{criterion}"] == max(fitted["valid_by_choice"].values())


def test_the_baseline_reads_both_texts_of_a_pair() -> None:
    """Only the second texts tell the classes apart."""
    second = tuple("yes it is" if index % 2 else "no way" for index in range(40))
    pairs = examples(40, second=second)
    drawn = {(8, seed): pairs.take(range(16)) for seed in (0, 1)}
    result = few_labels._tfidf(Protocol(budgets=(8,), seeds=(0, 1)), pairs, pairs, drawn)
    close(result["accuracy_mean"], 1.0)


def test_the_table_has_a_column_per_budget_and_the_baseline_last() -> None:
    runs = [{"labels": budget, "seed": seed, "accuracy": 0.5, "macro_f1": 0.5} for budget in (4, 8) for seed in (0, 1)]
    entry = {"runs": runs, "macro_f1_mean": 0.5, "calibration_error_mean": 0.1, "trained_parameters": 7}
    compared = {"tfidf": {"runs": runs, "macro_f1_mean": 0.5}, "probe": entry, "majority": {"accuracy_mean": 0.5}}
    lines = few_labels.table(compared).splitlines()
    assert [name in lines[0] for name in ("4 per class", "8 per class")] == [True, True]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["probe", "tfidf"]
