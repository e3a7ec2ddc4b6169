"""Benchmark the image pipeline: images per second from JPEG files to batches, by recipe and number of worker processes.

Random crops of two photographs are written as JPEG files of ImageNet's usual size (500 × 375). Then
`fm_jax/data/images/pictures.py` reads them as in training: decode, augment, normalise, stack. With 0 workers, two
threads of this process read; each worker is a process with two threads. The start of the workers is not counted. `cpu`
is the CPU time of one image, measured without threads; on a busy machine it is the number to compare.

    python -m experiments.benchmarks.image_pipeline --workdir runs/image_pipeline

The figures are appended to `history.jsonl` in this file's folder (`--history PATH`: to another file; `--history none`:
to none).

Measured at 224 × 224 on two cores (load average 2.9), with Python 3.11 and Pillow 13.0: the first line of
`history.jsonl`. A row of simclr has two views.

    | recipe   | cpu (ms) | 0 workers | 1 workers | 2 workers |
    |----------|---------:|----------:|----------:|----------:|
    | decode   |    3.540 |     449.2 |     469.8 |     546.5 |
    | imagenet |    3.610 |     510.3 |     488.2 |     605.7 |
    | finetune |    5.490 |     315.5 |     371.3 |     364.1 |
    | simclr   |    10.45 |     143.7 |     122.8 |     203.0 |
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.benchmarks import _readers
from fm_jax import cli
from fm_jax.core.errors import ConfigError
from fm_jax.data.images import folder as image_folder
from fm_jax.data.images import pictures, views
from fm_jax.data.stream.loader import Batches
from fm_jax.data.stream.source import Source
from fm_jax.evals.report import history, report, results

Name = Literal["decode", "imagenet", "finetune", "simclr"]


@dataclass(frozen=True)
class Config:
    """The images, recipes and worker counts."""

    images: int = 128
    batch_size: int = 32
    batches: int = 6  # measured batches, after one that is not
    size: int = 224
    recipes: tuple[Name, ...] = ("decode", "imagenet", "finetune", "simclr")
    workers: tuple[int, ...] = (0, 1, 2)
    history: Path | None = Path("experiments/benchmarks/history.jsonl")  # file to append the figures to; none: no file

    def __post_init__(self) -> None:
        """Refuse an empty measurement."""
        if min(self.images, self.batch_size, self.batches, self.size) < 1 or not self.recipes or not self.workers:
            raise ConfigError("images, batch_size, batches, size, recipes and workers must be above 0")
        if self.images < self.batch_size:
            raise ConfigError(f"{self.images} images are fewer than one batch of {self.batch_size}")


def config() -> Config:
    """Return the benchmark at ImageNet's image size."""
    return Config()


def debug() -> Config:
    """Return a few small images."""
    return Config(images=8, batch_size=4, batches=1, size=16, recipes=("decode", "simclr"), workers=(0,), history=None)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Write the files, measure every recipe and worker count, and return the rates, also written to results.json."""
    history.check(cfg.history)
    folder = workdir / "images"
    _readers.write(folder, cfg.images)
    rows: list[dict[str, Any]] = []
    try:
        for name in cfg.recipes:
            source = pictures.training(shape(cfg, folder, name), workdir)
            rates = {str(n): images_per_second(source, cfg.batch_size, cfg.batches, workers=n) for n in cfg.workers}
            rows.append({"recipe": name, "cpu_ms": cpu_milliseconds(source, cfg.batch_size), **rates})
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"images per second; load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    heads = {"recipe": "recipe", "cpu_ms": "cpu (ms)"} | {str(n): f"{n} workers" for n in cfg.workers}
    print(report.table(rows, heads))
    measured = {"load": os.getloadavg()[0], "rows": rows}
    results.write(workdir / "results.json", measured)
    if cfg.history is not None:
        numbers = {f"{row['recipe']}/{heads[name]}": row[name] for row in rows for name in row if name != "recipe"}
        print(history.record(cfg.history, "benchmarks.image_pipeline", numbers, cfg))
    return measured


def shape(cfg: Config, folder: Path, name: Name) -> pictures.Config:
    """Return the source's config for one recipe."""
    recipes = {"imagenet": views.imagenet(), "finetune": views.finetune(), "simclr": views.simclr()}
    recipe = recipes.get(name, views.Recipe())
    return pictures.Config(
        image_folder.Config(folder, splits=("train", "train", "train")),
        size=cfg.size,
        mean=pictures.IMAGENET_MEAN,
        std=pictures.IMAGENET_STD,
        recipe=recipe,
    )


def images_per_second(source: Source, batch_size: int, batches: int, *, workers: int = 0, threads: int = 2) -> float:
    """Return the rows per second of a loader, after its first batch."""
    reader = Batches(source, batch_size, workers=workers, threads=threads).iterate()
    try:
        next(reader)
        started = time.perf_counter()
        for _ in range(batches):
            next(reader)
        return round(batches * batch_size / (time.perf_counter() - started), 1)
    finally:
        reader.close()  # type: ignore[attr-defined]  # a generator: this ends its workers


def cpu_milliseconds(source: Source, rows: int) -> float:
    """Return the CPU time per row in milliseconds."""
    reader = Batches(source, rows, threads=0).iterate()
    next(reader)
    started = time.process_time()
    next(reader)
    return round(1e3 * (time.process_time() - started) / rows, 2)


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("history",))
