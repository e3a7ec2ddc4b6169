"""history.jsonl: one line a measurement, so that a benchmark's figures can be followed over commits and machines."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fm_jax.core import json_file, provenance
from fm_jax.core.config import to_dict
from fm_jax.core.errors import DataError, shown
from fm_jax.evals.report import report, results

Entry = dict[str, Any]
"""{benchmark, date, commit, machine, load, versions, config, numbers}; `numbers` maps a name to a number."""


def check(path: Path | None) -> None:
    """Refuse a file that a measurement could not be appended to, before anything is measured; None is no file.

    Raises:
        DataError: its folder does not exist, or it holds something else.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise DataError(f"history {path}: no folder {path.parent}; run from the repository, or give --history PATH")
    read(path)


def record(path: Path, benchmark: str, numbers: Mapping[str, float], cfg: Any) -> str:
    """Append what a benchmark measured with its config `cfg`; return the table of what can be compared with it."""
    config = {name: value for name, value in to_dict(cfg).items() if name != "history"}
    entry = append(path, benchmark, numbers, config=config)
    return table(comparable(read(path), entry))


def append(path: Path, benchmark: str, numbers: Mapping[str, float], *, config: Mapping[str, Any]) -> Entry:
    """Append what was measured just now, with where and on what, as one line of JSON; return it.

    Args:
        path: the file; made where it is missing.
        benchmark: name of the experiment's module, without `experiments.`.
        numbers: name -> number.
        config: of the benchmark: only lines of equal configs can be compared.

    Raises:
        DataError: a value that JSON cannot hold.
    """
    entry = results.plain(
        {
            "benchmark": benchmark,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": _commit(),
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "devices": provenance.devices()},
            "load": round(os.getloadavg()[0], 2),
            "versions": {"python": platform.python_version(), **provenance.versions()},
            "config": config,
            "numbers": numbers,
        },
        path.name,
    )
    with path.open("a", encoding="utf-8") as file:  # one short write: two benchmarks may end at the same time
        file.write(json.dumps(entry, allow_nan=False) + "\n")
    return entry


def read(path: Path) -> list[Entry]:
    """Return every line, the oldest first; a missing file has none.

    Raises:
        DataError: a line that `append` did not write, with its number.
    """
    lines = json_file.contents(path, DataError).splitlines() if path.exists() else []
    entries = []
    for number, line in enumerate(lines, start=1):
        entry = json_file.parse(line, f"history {path}, line {number}", DataError)
        if not _is_entry(entry):
            raise DataError(f"history {path}, line {number}: not a measurement ({shown(entry)}); take the line out")
        entries.append(entry)
    return entries


def _is_entry(entry: Any) -> bool:
    """Say whether a line has what `table` shows."""
    if not isinstance(entry, dict) or "load" not in entry or not isinstance(entry.get("numbers"), dict):
        return False
    figures = [entry["load"], *entry["numbers"].values()]
    texts = all(isinstance(entry.get(name), str) for name in ("benchmark", "date"))
    return texts and all(isinstance(figure, int | float | None) for figure in figures)


def table(entries: Sequence[Entry], last: int = 5) -> str:
    """Return a Markdown table: a row for each number, a column for each of the last measurements.

    Raises:
        DataError: there is no measurement.
    """
    if not entries:
        raise DataError("there is no measurement to show")
    shown = entries[-last:]
    heads = {str(i): f"{entry['date'][:10]} {_short(entry)}" for i, entry in enumerate(shown)}
    names = dict.fromkeys(name for entry in shown for name in entry["numbers"])
    rows = [{"number": "load average"} | {str(i): entry["load"] for i, entry in enumerate(shown)}]
    rows += [{"number": name} | {str(i): e["numbers"].get(name) for i, e in enumerate(shown)} for name in names]
    return report.table(rows, {"number": "number"} | heads)


def comparable(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """Return the measurements of the same benchmark with the same config on the same kind of machine."""
    same = ("benchmark", "config", "machine")
    return [other for other in entries if all(other.get(name) == entry[name] for name in same)]


def _commit() -> str | None:
    """Return the commit of the running code, with a + where files were changed since."""
    git = provenance.git(Path(__file__))
    return None if git is None else git["revision"] + ("+" if git["dirty"] else "")


def _short(entry: Entry) -> str:
    commit = entry.get("commit") or "no commit"
    return commit[:7] + "+" * commit.endswith("+")


def _processor() -> str:
    """Return the processor's name; Linux tells it in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
