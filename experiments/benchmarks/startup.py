"""Benchmark the start: from the command to the end of the first training step, beside `transformers` on torch.

Every turn is a new process that imports what it needs, opens the GPT-2 of `train_step` from a folder of our hub, and
takes one step on one batch. `cold` has an empty cache of compiled programs, `warm` the one that an earlier run filled;
the peer is eager and has none. The parts are apart: imports; opening the model and making the optimiser; the step; and
in both of the latter tracing, lowering and compiling (or reading what was compiled), as `jax.monitoring` tells them.

`command` is a command of ours, `lm_pretrain --config debug`, until its first line of metrics: with reading its text,
training its tokenizer and its log. It has no peer. `again` is our own start: its ratio shows the noise, and it needs no
torch.

The turns go A B C, C B A, …; `_pairs.py` says what a busy machine is.

    python -m experiments.benchmarks.startup --workdir runs/startup

Needs torch and transformers (`.[benchmarks]`), except for `--peers again`. Nothing has been measured on an idle machine
yet; the results go to `history.jsonl` (`--history PATH`: to another file; `--history none`: to none).
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.benchmarks import _families, _machine, _pairs, _sides
from experiments.benchmarks._families import FAMILIES
from experiments.benchmarks._sides import Start, Turn
from fm_jax import cli
from fm_jax.core.errors import ConfigError
from fm_jax.evals.report import report

Peer = Literal["eager", "again"]
Cache = Literal["cold", "warm"]
_PARTS = ("import_s", "model_s", "step_s", "trace_s", "lower_s", "compile_s")
_COMMAND = "experiments.language.lm_pretrain"


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The caches and the peers."""

    caches: tuple[Cache, ...] = ("cold", "warm")
    peers: tuple[Peer, ...] = ("eager",)
    command: bool = True  # start lm_pretrain as well
    small: bool = False  # a model that compiles in two seconds; its times mean nothing

    def __post_init__(self) -> None:
        """Refuse an empty comparison."""
        super().__post_init__()
        if not self.caches or not self.peers:
            raise ConfigError("caches and peers must name at least one each")


def config() -> Config:
    """Return both caches beside eager torch."""
    return Config()


def debug() -> Config:
    """Return one pair of starts with a warm cache and a small model, beside our own start."""
    return Config(caches=("warm",), peers=("again",), command=False, small=True, pairs=1, allow_busy=True, history=None)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure, print the tables; return the rows, also written to results.json."""
    _pairs.check(cfg, cfg.peers)
    cpus = _machine.cores(cfg.threads)
    given, logs = _families.write("gpt2", workdir, small=cfg.small), workdir / "logs"
    turns: dict[str, Callable[[], Turn]] = {}
    for cache in cfg.caches:
        turns[f"ours {cache}"] = partial(ours, workdir, given, cache, cpus, logs / f"ours_{cache}.log")
        if cfg.command:
            turns[f"command {cache}"] = partial(command, workdir, cache, cpus, logs / f"command_{cache}.log")
    for peer in cfg.peers:
        turns[peer] = partial(theirs, workdir, given, peer, cpus, logs / f"{peer}.log")
    first = {name: turn() for name, turn in turns.items()}  # fills the warm caches and the file system's
    losses = {name: turn.found["loss"] for name, turn in first.items() if "loss" in turn.found}
    _families.check_losses("gpt2", losses)
    quiet = cfg.allow_busy or _machine.wait_until_quiet(cpus, cfg.busy_above, cfg.patience)
    measured = _pairs.interleave(turns, cfg.pairs, cpus) if quiet else None
    rows = []
    for cache in cfg.caches:
        rows += [
            _pairs.row(cfg, f"first step, {cache} cache", peer, measured, (f"ours {cache}", peer)) for peer in cfg.peers
        ]
        if cfg.command:
            sides = (f"command {cache}", None)
            rows.append(_pairs.row(cfg, f"lm_pretrain, {cache} cache", "nothing", measured, sides))
    parts = [] if measured is None else [medians(name, taken) for name, taken in measured.turns.items()]
    if parts:
        print(report.table(parts, ["side", "wall_s", *(part for part in _PARTS if part in parts[0]), "cpu_s"]))
    return _pairs.finish(cfg, workdir, "benchmarks.startup", rows, parts=parts, turns=_pairs.as_data(measured))


def ours(workdir: Path, given: dict[str, str], cache: str, cpus: tuple[int, ...], log: Path) -> Turn:
    """Start our side once; a cold cache is emptied first."""
    more = {"folder": given["folder"], "batch": given["batch"], "learning_rate": _families.LEARNING_RATE}
    start = Start("_ours", "first_step", more | {"family": "gpt2", "cache": str(_cache(workdir, cache))})
    return _sides.fresh("ours", start, cpus, log)


def theirs(workdir: Path, given: dict[str, str], peer: str, cpus: tuple[int, ...], log: Path) -> Turn:
    """Start a peer once; `again` is our start with a warm cache."""
    if peer == "again":
        return ours(workdir, given, "warm", cpus, log)
    more = {"folder": given["folder"], "inputs": given["inputs"], "learning_rate": _families.LEARNING_RATE}
    return _sides.fresh(peer, Start("_torch", "first_step", more | {"kind": FAMILIES["gpt2"].theirs}), cpus, log)


def command(workdir: Path, cache: str, cpus: tuple[int, ...], log: Path) -> Turn:
    """Run lm_pretrain's debug preset in a new work directory; `wall` ends with its first line of metrics."""
    folder = (workdir / "command").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    pin = f"import os, runpy, sys; os.sched_setaffinity(0, {list(cpus)}); sys.argv[0:1] = ['lm_pretrain']; "
    script = f"{pin}runpy.run_module('{_COMMAND}', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", script, "--config", "debug", "--workdir", str(folder)]
    kept = _cache(workdir, f"command_{cache}")
    environment = _sides.environment(Start("_ours", "", {}), len(cpus)) | {"JAX_COMPILATION_CACHE_DIR": str(kept)}

    def answer(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
        metrics = folder / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.stat().st_size:
                return {}
            time.sleep(0.005)
        return {} if metrics.exists() else None

    return _sides.watched("lm_pretrain", line, environment, log, answer)


def _cache(workdir: Path, name: str) -> Path:
    """Return a folder of compiled programs, emptied if it is to be cold."""
    folder = workdir.absolute() / "caches" / name
    if name.endswith("cold"):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def medians(name: str, turns: list[Turn]) -> dict[str, Any]:
    """Return the medians of the parts of one side's starts."""
    parts: dict[str, Any] = {"side": name, "wall_s": float(np.median([turn.wall for turn in turns]))}
    for part in _PARTS:
        if part in turns[0].found:
            parts[part] = float(np.median([turn.found[part] for turn in turns]))
    return parts | {"cpu_s": float(np.median([turn.cpu for turn in turns]))}


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
