"""Measure two or more sides in turn (A B C, C B A, …), so that a drift of the machine meets all of them alike.

A ratio is that of two neighbouring turns, and the median over all pairs is quoted with its quartiles: neighbours of a
virtual machine come and go within minutes. A machine on which other processes took more than a few per cent of the
cores is called busy, and no ratio is quoted: torch's threads wait for each other and XLA's less, so with one of two
cores taken the same pair read 1.3 to 1.6 instead of 0.63.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import _machine
from experiments.benchmarks._sides import WANTED, Side, Start, Turn
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.evals.report import history, report, results

PAUSE = 0.05  # seconds between two turns: longer than the worker threads of the last one spin
_MOST_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often, on how many cores, and what to do on a busy machine."""

    pairs: int = 15  # turns of each side
    threads: int = 2  # cores, and threads of each side
    busy_above: float = 0.05  # share of these cores that others may take before the machine is called busy
    patience: float = 60.0  # seconds to wait for a quiet machine before each comparison
    allow_busy: bool = False  # measure on a busy machine too; the results are marked
    history: Path | None = Path("experiments/benchmarks/history.jsonl")  # file to append the figures to; none: no file

    def __post_init__(self) -> None:
        """Refuse an empty measurement."""
        check_least(self, pairs=1, threads=1, patience=0)
        if not 0 < self.busy_above <= 1:
            raise ConfigError(f"busy_above is a share, above 0 and at most 1, not {self.busy_above}")


@dataclass(frozen=True)
class Measured:
    """All turns of one comparison, and what else the machine did meanwhile."""

    turns: dict[str, list[Turn]]  # name of the side -> its turns, in order
    others: float  # share of the cores that other processes took during the turns
    load_before: float  # load average before the first turn; ours are in it after some seconds
    load_most: float  # largest load average after a turn

    def facts(self) -> dict[str, float]:
        """Return what a row says of the machine."""
        return {"others": self.others, "load_before": self.load_before, "load_most": self.load_most}

    def each(self, counts: Mapping[str, int]) -> "Measured":
        """Return the times of one of the `counts[side]` things (rows, tokens) that a turn works on."""
        turns = {
            name: [
                replace(turn, **{kind: getattr(turn, kind) / counts[name] for kind in ("wall", "user", "system")})
                for turn in side
            ]
            for name, side in self.turns.items()
        }
        return replace(self, turns=turns)


def check(plan: Plan, peers: Sequence[str], *, needs: Sequence[str] = ("torch", "transformers")) -> None:
    """Refuse what could not be measured or recorded, before anything is prepared.

    Args:
        plan: how often and where.
        peers: names of the peers; `again` is ours.
        needs: libraries of the other peers.

    Raises:
        ConfigError: a peer's library is missing, there are too few cores, or the system does not tell its load.
        DataError: the history cannot be appended to.
    """
    history.check(plan.history)
    _machine.taken(_machine.cores(plan.threads))
    other = [peer for peer in peers if peer != "again"]
    if other and (missing := [name for name in needs if find_spec(name) is None]):
        raise ConfigError(f"{other[0]} cannot be measured without {' and '.join(missing)}; {WANTED}")


def compare(
    plan: Plan, starts: Mapping[str, Start], logs: Path, check: Callable[[Mapping[str, dict[str, Any]]], None]
) -> tuple[Measured | None, dict[str, dict[str, Any]]]:
    """Start every side, check what they prepared, and measure them in turn.

    Args:
        plan: how often, where, and what to do on a busy machine.
        starts: name -> how the side starts; the first is ours.
        logs: folder for the sides' standard errors.
        check: gets {name: facts}; raises where the sides do not compute the same, before anything is timed.

    Returns:
        The turns, or None if the machine was busy before them; and the facts by name.
    """
    cpus = _machine.cores(plan.threads)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(name, start, cpus, logs / f"{name}.log")) for name, start in starts.items()
        }
        facts = {name: side.facts for name, side in sides.items()}
        check(facts)
        if not plan.allow_busy and not _machine.wait_until_quiet(cpus, plan.busy_above, plan.patience):
            return None, facts
        return interleave({name: side.turn for name, side in sides.items()}, plan.pairs, cpus), facts


def interleave(turns: Mapping[str, Callable[[], Turn]], pairs: int, cpus: tuple[int, ...]) -> Measured:
    """Take `pairs` turns of every side, in the given order and its reverse in turn."""
    taken: dict[str, list[Turn]] = {name: [] for name in turns}
    load_before = load_most = os.getloadavg()[0]
    others = _machine.Others(cpus)
    for number in range(pairs):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            time.sleep(PAUSE)
            before, own, started = _machine.taken(cpus), time.process_time(), time.perf_counter()
            turn = turns[name]()
            wall, own = time.perf_counter() - started, time.process_time() - own
            others.add(before, _machine.taken(cpus), own + turn.cpu, wall)
            load_most = max(load_most, os.getloadavg()[0])
            taken[name].append(turn)
    return Measured(taken, round(others.share, 4), round(load_before, 2), round(load_most, 2))


def row(
    plan: Plan,
    family: str,
    against: str,
    measured: Measured | None,
    sides: tuple[str, str | None],
    *,
    bound: float | None = None,
    seconds: Callable[[Turn], float] = lambda turn: turn.wall,
) -> dict[str, Any]:
    """Return the result of one pair: medians, quartiles, ratios, and the share of the bound that ours reaches.

    Args:
        plan: says what is busy.
        family: what was measured.
        against: the peer's name in the row.
        measured: the turns; None if the machine was busy before them.
        sides: names of our side and of the peer's; None where there is none to compare with.
        bound: seconds that no implementation can go below.
        seconds: of a turn; the wall by default.
    """
    found: dict[str, Any] = {"family": family, "against": against, "busy": True}
    found |= dict.fromkeys(("ours", "peer", "ratio", "bound_fraction"))
    if measured is None:
        return found
    found["busy"] = measured.others > plan.busy_above
    taken = {side: measured.turns[name] for side, name in zip(("ours", "peer"), sides, strict=True) if name}
    times = {side: np.array([seconds(turn) for turn in turns]) for side, turns in taken.items()}
    work = {side: np.array([turn.cpu for turn in turns]) for side, turns in taken.items()}
    if not found["busy"] or plan.allow_busy:
        for side, values in times.items():
            found |= {side: _rounded(np.median(values)), f"{side}_quartiles": _quartiles(values)}
        if bound is not None:
            found["bound_fraction"] = _rounded(bound / np.median(times["ours"]))
        if "peer" in taken:
            ratios = times["peer"] / times["ours"]
            found |= {"ratio": _rounded(np.median(ratios)), "ratio_quartiles": _quartiles(ratios)}
            found["cpu_ratio"] = _rounded(np.median(work["peer"] / np.maximum(work["ours"], 1e-9)))
    for side, turns in taken.items():  # CPU time and faults say something on a busy machine too
        found |= {
            f"{side}_cpu": _rounded(np.median(work[side])),
            f"{side}_system": _rounded(np.median([turn.system for turn in turns])),
            f"{side}_faults": int(np.median([turn.faults for turn in turns])),
        }
    return found | measured.facts()


def keep(workdir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Print the last row, and write all so far: a later comparison may fail."""
    print(rows[-1], flush=True)
    results.write(workdir / "results.json", {"rows": list(rows)})


def finish(plan: Plan, workdir: Path, benchmark: str, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Print the table, write results.json and, if no row is busy or that is allowed, append a line to the history."""
    heads = {
        "family": "family", "against": "against", "ours": "ours (s)", "peer": "peer (s)", "ratio": "ratio",
        "ratio_quartiles": "quartiles", "cpu_ratio": "CPU ratio", "bound_fraction": "of the bound",
        "others": "others' CPU", "busy": "",
    }  # fmt: skip
    print(report.table([shown(row) for row in rows], {key: head for key, head in heads.items() if _any(rows, key)}))
    for skipped in more.get("skipped", ()):
        print(f"skipped: {skipped}")
    measured = {"rows": list(rows), **more}
    results.write(workdir / "results.json", measured)
    busy = [f"{row['family']} against {row['against']}" for row in rows if row["busy"]]
    if busy:
        print(f"busy: other processes took more than {plan.busy_above:.0%} of the cores during {', '.join(busy)}")
    if plan.history is not None and (plan.allow_busy or not busy):
        print(history.record(plan.history, benchmark, numbers(rows), plan))
    elif plan.history is not None:
        print("nothing is added to the history; run again on an idle machine, or with --allow_busy true")
    return measured


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the table prints it."""
    low_high = row.get("ratio_quartiles")
    return dict(row) | {
        "ratio_quartiles": None if low_high is None else f"{low_high[0]:.3g} – {low_high[1]:.3g}",
        "busy": "busy" if row["busy"] else "",
    }


def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return {family/against/name: number} of all rows, for the history."""
    return {
        f"{row['family']}/{row['against']}/{name}": float(value)
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and (name != "busy" or value)
    }


def as_data(measured: Measured | None) -> dict[str, list[dict[str, Any]]]:
    """Return every turn as JSON data."""
    return {} if measured is None else {name: [asdict(turn) for turn in side] for name, side in measured.turns.items()}


def _any(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.25, 0.75))
    return _rounded(low), _rounded(high)


def _rounded(value: Any) -> float:
    return float(f"{float(value):.{_MOST_DIGITS}g}")
