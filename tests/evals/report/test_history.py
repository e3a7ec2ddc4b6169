"""history.jsonl gets a line a measurement, and keeps what stood there."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.benchmarks import (
    checkpoint,
    data,
    decode,
    detectors,
    growth,
    hub_load,
    image_pipeline,
    precision,
    startup,
    train_step,
)
from fm_jax.core.errors import DataError
from fm_jax.evals.report import history

ROOT = Path(__file__).parents[3]
TRACKED = ROOT / "experiments" / "benchmarks" / "history.jsonl"


@dataclass(frozen=True)
class Config:
    rows: int = 4
    history: Path | None = None


def test_a_line_says_what_was_measured_where_on_what_and_when(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("")
    shown = history.record(path, "benchmarks.toy", {"images a second": 2.5}, Config(history=path))
    (line,) = path.read_text().splitlines()
    entry = json.loads(line)
    assert [*entry] == ["benchmark", "date", "commit", "machine", "load", "versions", "config", "numbers"]
    assert entry["benchmark"] == "benchmarks.toy" and entry["numbers"] == {"images a second": 2.5}
    assert entry["config"] == {"rows": 4}  # where the line goes changes no number
    assert entry["date"][:2] == "20" and entry["machine"]["cores"] > 0 and entry["load"] >= 0
    assert {"python", "jax", "numpy"} <= entry["versions"].keys()
    assert str(tmp_path) not in line and str(Path.home()) not in line
    assert "images a second" in shown and "2.500" in shown


def test_only_what_is_alike_is_set_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.record(path, "benchmarks.toy", {"rate": 1.0}, Config(rows=4))
    history.record(path, "benchmarks.toy", {"rate": 20.0}, Config(rows=8))
    history.record(path, "benchmarks.other", {"rate": 300.0}, Config(rows=4))
    shown = history.record(path, "benchmarks.toy", {"rate": 1.5, "memory": 4.0}, Config(rows=4))
    assert len(history.read(path)) == 4
    assert "1.000" in shown and "1.500" in shown and "20.00" not in shown and "300.0" not in shown
    memory = [cell.strip() for cell in shown.splitlines()[-1].strip("|").split("|")]
    assert memory == ["memory", "—", "4.000"]  # the first line did not measure it


def test_a_line_that_is_no_measurement_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.check(path)
    history.check(None)
    history.append(path, "benchmarks.toy", {"rate": 1.0}, config={})
    for bad in ("{", "[]", '{"benchmark": "a"}'):
        path.write_text(path.read_text().splitlines()[0] + "\n" + bad + "\n")
        with pytest.raises(DataError, match=r"history\.jsonl, line 2"):
            history.check(path)
    with pytest.raises(DataError, match="--history PATH"):
        history.check(tmp_path / "nowhere" / "history.jsonl")


def test_no_measurement_is_no_table() -> None:
    with pytest.raises(DataError, match="no measurement"):
        history.table([])


BENCHMARKS = [checkpoint, data, decode, detectors, growth, hub_load, image_pipeline, precision, startup, train_step]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)
def test_a_benchmark_writes_to_the_tracked_file_only_when_it_measures_in_earnest(benchmark) -> None:
    assert benchmark.config().history == TRACKED.relative_to(ROOT)
    assert benchmark.debug().history is None


def test_the_tracked_file_can_be_read() -> None:
    for entry in history.read(TRACKED):
        assert entry["commit"] and not entry["commit"].endswith("+"), "measured with files that no commit holds"
        assert all(isinstance(number, int | float) for number in entry["numbers"].values())
