"""Benchmark loading GPT-2 XL: time and peak memory of this project and of `transformers`, from the same random file.

Each load runs in its own process, and the sides take turns. Imports are not counted. With `warm` the file is in the
page cache; with `cold` the cache was told to drop it. `ready` is the time of the call that opens the model. `read` also
includes reading one number of every page, because a side may map the file and read it later. `cpu` is the CPU time of
all threads. Memory is the peak of the process: `anonymous` is its own memory, `resident` also counts mapped parts of
the file and of libraries. The third side, `plain`, only allocates the memory and reads the file into it; no loader that
copies the file can be faster.

    python -m experiments.benchmarks.hub_load --workdir runs/hub_load            # 6.2 GB of disk, removed at the end
    python -m experiments.benchmarks.hub_load --workdir runs/hub_load --layers 6 # a seventh of it

The medians are appended to `history.jsonl` in this file's folder (`--history PATH`: to another file; `--history none`:
to none).

Hardware: two cores, 10 GB of memory. Measured with `--repetitions 2` (6.23 GB in float32, medians) on two cores that
other processes kept busy (load average 8 to 26). The times are therefore unreliable (`plain` alone took from 11 to 72
s); the memory is reliable.

    dtype     cache  side    ready_s  read_s   cpu_s  anonymous_GB  resident_GB
    float32   warm   ours      70.2     71.3    15.0       6.24        6.46
                     plain     57.3     58.0    12.9       6.23        6.41
                     theirs     0.8      2.6     0.7       0.01        6.76
    float32   cold   ours      63.0     63.2    18.0       6.24        6.46
                     plain     35.1     35.4    15.7       6.23        6.41
                     theirs     3.2     16.2     4.6       0.01        6.76
    bfloat16  warm   ours      34.9     35.7    12.6       3.13        3.34
                     plain     27.5     28.0    11.1       6.23        6.41
                     theirs     6.0      6.1     3.0       3.12        9.87
    bfloat16  cold   ours      82.7     83.2    15.2       3.13        3.34
                     plain     40.0     40.4    15.5       6.23        6.41
                     theirs    31.6     31.8    10.1       3.12        9.87

In the file's dtype, theirs opens at once because it maps the file. Ours stacks the layers, so it copies them; this
costs the size of the model in memory, and 2.1 CPU-seconds more than `plain`. In another dtype both sides copy. Theirs
was faster here but also has the full file resident (9.9 GB); ours has only the model (3.3 GB). Most of `plain`'s time
is memory allocation, not reading: on this virtual machine, the first write to a new GB took 2.0 CPU-seconds in pages of
2 MB, which numpy requests (`np.empty(1 << 30, np.uint8)[::4096] = 1`), and 0.7 in pages of 4 kB (the same on
`mmap.mmap(-1, 1 << 30)`). Large pages are fast only where the kernel has them at hand: on a model of 1.42 GB (`--layers
24 --width 1024 --heads 16`) five runs of `plain` took 0.4 to 2.9 CPU-seconds and ours 2.1 to 3.5; with
`NUMPY_MADVISE_HUGEPAGE=0` they took 0.7 and 1.1. Set it where loading matters and memory is fragmented.

It needs torch and transformers.
"""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from fm_jax import cli
from fm_jax.core.errors import ConfigError, ResourceError
from fm_jax.evals.report import history, report, results
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.files import safetensors
from fm_jax.models.language import decoder

Side = Literal["ours", "theirs", "plain"]
Cache = Literal["warm", "cold"]
_EVERY = 0.005  # seconds between two memory measurements
_CHILD = "import sys; from experiments.benchmarks.hub_load import measure; measure(*sys.argv[1:])"


@dataclass(frozen=True)
class Config:
    """The model, the sides and the number of loads."""

    layers: int = 48
    width: int = 1600
    heads: int = 25
    vocabulary: int = 50257
    repetitions: int = 3  # loads per side, cache state and dtype
    sides: tuple[Side, ...] = ("ours", "theirs", "plain")
    caches: tuple[Cache, ...] = ("warm", "cold")
    dtypes: tuple[pretrained.Dtype, ...] = ("float32", "bfloat16")  # dtypes to load in; the file has float32
    keep: bool = False  # keep the file at the end
    history: Path | None = Path("experiments/benchmarks/history.jsonl")  # file to append the figures to; none: no file

    def __post_init__(self) -> None:
        """Refuse an empty model or comparison."""
        if min(self.layers, self.width, self.heads, self.vocabulary, self.repetitions) < 1 or not self.sides:
            raise ConfigError("layers, width, heads, vocabulary, repetitions and sides must be above 0")


def config() -> Config:
    """Return GPT-2 XL's sizes."""
    return Config()


def debug() -> Config:
    """Return our side alone, on a file of a few kilobytes."""
    return Config(
        layers=2,
        width=16,
        heads=4,
        vocabulary=64,
        repetitions=1,
        sides=("ours",),
        caches=("warm",),
        dtypes=("float32",),
        history=None,
    )


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Write the file, load it repeatedly, print the table; return the medians, also written to results.json."""
    history.check(cfg.history)
    folder = workdir / "model"
    size = write(cfg, folder)
    rows: list[dict[str, Any]] = []
    try:
        for dtype, cache, repetition in itertools.product(cfg.dtypes, cfg.caches, range(cfg.repetitions)):
            for side in cfg.sides if repetition % 2 == 0 else cfg.sides[::-1]:
                case = {"dtype": dtype, "cache": cache, "side": side}
                rows.append(case | load(side, folder, dtype, cache))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        if not cfg.keep:
            shutil.rmtree(folder, ignore_errors=True)
    cases = list(dict.fromkeys((row["dtype"], row["cache"], row["side"]) for row in sorted(rows, key=_case)))
    names = [name for name in rows[0] if name not in ("dtype", "cache", "side")]
    medians = [
        dict(zip(("dtype", "cache", "side"), case, strict=True))
        | {name: median(row[name] for row in rows if _case(row) == case) for name in names}
        for case in cases
    ]
    print(f"{size / 1e9:.3g} GB, medians of {cfg.repetitions} loads; load average {os.getloadavg()[0]:.1f}")
    print(report.table(medians, list(medians[0])))
    measured = {"bytes": size, "loads": rows, "medians": medians}
    results.write(workdir / "results.json", measured)
    if cfg.history is not None:
        numbers = {f"{'/'.join(_case(row))}/{name}": row[name] for row in medians for name in names}
        print(history.record(cfg.history, "benchmarks.hub_load", numbers, cfg))
    return measured


def _case(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["dtype"], row["cache"], row["side"]


def write(cfg: Config, folder: Path) -> int:
    """Write a checkpoint folder of random weights, one tensor at a time; return the size of the weights in bytes."""
    shape = decoder.gpt(cfg.layers, cfg.width, cfg.heads, cfg.vocabulary)
    module = decoder.Decoder(shape)
    family = families.writing(module)
    specs = table.specs(family.table(module), families.abstract(module))
    size = sum(4 * int(np.prod(spec.shape)) for spec in specs.values())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if (free := shutil.disk_usage(folder).free) < 1.1 * size:
        raise ResourceError(
            f"{folder} needs {size / 1e9:.1f} GB of disk, but only {free / 1e9:.1f} GB are free; lower --layers"
        )
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)

    def draw() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in specs.items():
            yield name, np.resize(noise, spec.shape)

    safetensors.write(folder, specs, draw(), shard_bytes=1 << 40)
    (folder / "config.json").write_text(json.dumps(family.fields(module)), "utf-8")
    return size


def load(side: Side, folder: Path, dtype: pretrained.Dtype, cache: Cache) -> dict[str, float]:
    """Load in a separate process and return its measurements.

    Raises:
        ConfigError: a side's library is not installed.
        ResourceError: the process failed.
    """
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            if cache == "cold":
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass
    command = [sys.executable, "-c", _CHILD, side, str(folder.absolute()), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if "No module named" in done.stderr:
        raise ConfigError(
            f"{side} cannot be measured, {done.stderr.strip().splitlines()[-1]}; --sides ours leaves it out"
        )
    if done.returncode:
        raise ResourceError(f"{side} failed with exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(side: Side, folder: str, dtype: pretrained.Dtype) -> None:
    """Load in this process and print time in seconds and memory in GB, as JSON."""
    open_model = {"ours": _ours, "theirs": _theirs, "plain": lambda: _plain}[side]()
    peak, stop = [_anonymous()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not stop.wait(_EVERY):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, worked = time.perf_counter(), time.process_time()
    arrays = open_model(folder, dtype)
    ready = time.perf_counter() - started
    total = sum(float(array.reshape(-1)[::1024].sum()) for array in arrays)
    read, work = time.perf_counter() - started, time.process_time() - worked
    stop.set()
    watcher.join()
    if not np.isfinite(total):
        raise SystemExit("the loaded weights are not finite")
    print(
        json.dumps(
            {
                "ready_s": round(ready, 3),
                "read_s": round(read, 3),
                "cpu_s": round(work, 3),
                "anonymous_GB": round((max(peak[0], _anonymous()) - before) / 1e9, 3),
                "resident_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
            }
        )
    )


def _ours() -> Any:
    import jax

    def load_ours(folder: str, dtype: pretrained.Dtype) -> list[Any]:
        leaves = jax.tree.leaves(jax.block_until_ready(pretrained.load(folder, dtype=dtype).params))
        return [np.asarray(leaf) for leaf in leaves]  # a view: on a CPU the device's memory is the host's

    jax.devices()
    return load_ours


def _theirs() -> Any:
    from transformers import GPT2LMHeadModel

    def load_theirs(folder: str, dtype: str) -> list[Any]:
        return list(GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).requires_grad_(False).parameters())

    return load_theirs


def _plain(folder: str, dtype: pretrained.Dtype) -> list[Any]:
    with (Path(folder) / "model.safetensors").open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        memory, start = np.empty(size, np.uint8), 0
        while start < size:
            start += file.readinto(memory[start : start + (1 << 25)].data)
    return [memory]


def _anonymous() -> int:
    """Return the size of the process's anonymous memory in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("history",))
