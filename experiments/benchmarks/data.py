"""Benchmark the data pipelines: the time of a row, and of the training step that eats it, measured in turn.

A pipeline is what an experiment reads in training: packed blocks of tokens (lm_pretrain), blocks whose documents are
apart, sentence pairs (bert_pretrain), span corruption (t5_pretrain), JPEG files of 500 × 375 pixels with ImageNet's
random crop or the augmentation of ViT finetuning (image_classify, mae_pretrain). Its step is that of `train_step`, on
this machine's cores. `ours` and `peer` are seconds of a row: of the pipeline alone, with two threads that read, and of
the step alone. A ratio below 1 starves the step even on cores of its own. The CPU ratio is that of the CPU seconds of a
row: 100 means that reading costs 1 % of what the step does. `cores` is how many cores the readers kept busy.

    ./launch.sh local experiments.benchmarks.data
    ./launch.sh local experiments.benchmarks.data --pipelines jpeg_augmented --pairs 5

`rows/s` of a faster chip's step divided by the rows/s of a core here (1 / CPU seconds of a row) is the number of cores
that feed it. Processes that read (`--workers` of an experiment) are measured by `image_pipeline`. Measured: the section
Benchmarks of `experiments/README.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from experiments.benchmarks import _families, _pairs
from experiments.benchmarks._families import FAMILIES
from experiments.benchmarks._pairs import Measured
from experiments.benchmarks._readers import PIPELINES
from experiments.benchmarks._sides import Start
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError

Name = Literal[
    "blocks", "documents_apart", "sentence_pairs", "span_corruption", "jpeg_crop", "jpeg_augmented", "jpeg_small"
]
_STEP = "step"


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The pipelines, and how much of them is read in a turn."""

    pipelines: tuple[Name, ...] = get_args(Name)
    batches: int = 16  # read in a turn
    readers: int = 2  # threads that read; 0: rows are read on demand
    small: bool = False  # models of the same form that compile in seconds, on small rows; their times mean nothing

    def __post_init__(self) -> None:
        """Refuse an empty measurement."""
        super().__post_init__()
        check_least(self, batches=1, readers=0)
        if not self.pipelines:
            raise ConfigError("pipelines must name at least one")


def config() -> Config:
    """Return all pipelines."""
    return Config()


def debug() -> Config:
    """Return one turn of one pipeline, beside a small model."""
    return Config(pipelines=("blocks",), batches=1, small=True, pairs=1, allow_busy=True, history=None)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure every pipeline, print the table; return the rows, also written to results.json."""
    _pairs.check(cfg, ())
    rows: list[dict[str, Any]] = []
    for name in cfg.pipelines:
        family = PIPELINES[name].family
        batch_size, size = FAMILIES[family].small if cfg.small else FAMILIES[family].size
        given = _families.write(family, workdir / "models" / family, small=cfg.small)
        readers: dict[str, Any] = {"batches": cfg.batches, "threads": cfg.readers, "batch_size": batch_size}
        folder = str((workdir / "data").absolute())
        starts = {
            "ours": Start("_readers", "read", readers | {"pipeline": name, "folder": folder, "size": size}),
            _STEP: Start("_ours", "train", given_step(family, given)),
        }
        measured, _ = _pairs.compare(cfg, starts, workdir / "logs" / name, lambda facts: None)
        counts = {"ours": cfg.batches * batch_size, _STEP: batch_size}
        scaled = None if measured is None else measured.each(counts)
        rows.append(_pairs.row(cfg, name, f"{family} {_STEP}", scaled, ("ours", _STEP)) | cores(scaled))
        _pairs.keep(workdir, rows)
    return _pairs.finish(cfg, workdir, "benchmarks.data", rows)


def given_step(family: str, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return what prepares the family's training step."""
    return {
        "folder": paths["folder"],
        "family": family,
        "batch": paths["batch"],
        "learning_rate": _families.LEARNING_RATE,
    }


def cores(measured: Measured | None) -> dict[str, float]:
    """Return how many cores the readers kept busy, and the rows that one of them would read in a second."""
    if measured is None:
        return {}
    turns = measured.turns["ours"]
    return {
        "cores": round(float(np.median([turn.cpu / turn.wall for turn in turns])), 2),
        "rows_per_core_s": round(float(1 / np.median([turn.cpu for turn in turns])), 1),
    }


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
