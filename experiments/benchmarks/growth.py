"""Benchmark the cost of more: tokens per second with twice the layers, width, context, rows and devices.

The model is the GPT-2 form of `train_step` (4 layers of width 256, heads of 64, 8 rows of 256 tokens). The law is the
work: a model that needs twice the multiplications for a token should train half as many tokens in a second, so
`of the bound` is the tokens per second over what the multiplications (`_products.py`) of both steps predict, and below
1 the larger step is less efficient. A longer context takes fewer rows, so that the tokens of a step stay the same.
Devices are virtual ones that share this machine's cores: there the law is that nothing changes, and what is missing is
the cost of splitting the batch and adding up the gradients.

    ./launch.sh local experiments.benchmarks.growth
    ./launch.sh local experiments.benchmarks.growth --kinds width,length --factors 2,4,8

Each factor takes turns with the model at its first size (`_pairs.py`). The picture, growth.png, has the tokens per
second of every kind beside the law. Measured: the section Benchmarks of `experiments/README.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from experiments.benchmarks import _families, _pairs
from experiments.benchmarks._sides import Start
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.evals.report import growth as picture
from fm_jax.models.language import decoder

Kind = Literal["layers", "width", "length", "rows", "devices"]
_FAMILY, _BASE, _HEAD = "gpt2", "base", 64


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The first size, and what is made larger by which factors."""

    kinds: tuple[Kind, ...] = get_args(Kind)
    factors: tuple[int, ...] = (2, 4)
    layers: int = 4
    width: int = 256
    length: int = 256
    rows: int = 8
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        """Refuse an empty comparison and sizes that cannot be multiplied."""
        super().__post_init__()
        check_least(self, layers=1, width=1, length=2, rows=1, vocabulary=2)
        if not self.kinds or not self.factors or min(self.factors) < 2:
            raise ConfigError(f"kinds and factors must name at least one each, factors from 2, not {self.factors}")
        if self.width % _HEAD:
            raise ConfigError(f"width must be a multiple of {_HEAD}, the width of a head, not {self.width}")
        if {"length", "devices"} & set(self.kinds) and any(self.rows % factor for factor in self.factors):
            raise ConfigError(f"rows must be a multiple of every one of factors {self.factors}, not {self.rows}")


def config() -> Config:
    """Return all kinds at two and four times the size."""
    return Config()


def debug() -> Config:
    """Return one turn of twice the devices for a tiny model."""
    small: dict[str, Any] = {"layers": 1, "width": 64, "length": 8, "rows": 2, "vocabulary": 32}
    return Config(kinds=("devices",), factors=(2,), **small, pairs=1, allow_busy=True, history=None)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure every kind, print the table and draw it; return the rows, also written to results.json."""
    _pairs.check(cfg, ())
    rows: list[dict[str, Any]] = []
    for kind in cfg.kinds:
        factors = (1, *cfg.factors)
        sizes = {factor: size(cfg, kind, factor) for factor in factors}
        starts = {name(kind, factor): start(sizes[factor], workdir / "models") for factor in factors}
        measured, facts = _pairs.compare(cfg, starts, workdir / "logs" / kind, lambda found: None)
        tokens = {name(kind, factor): sizes[factor]["rows"] * sizes[factor]["length"] for factor in factors}
        work = {side: facts[side]["flops"] / count for side, count in tokens.items()}
        scaled = None if measured is None else measured.each(tokens)
        for factor in cfg.factors:
            side = name(kind, factor)
            law = work[_BASE] / work[side]
            bound = None if scaled is None else median(scaled, _BASE) / law
            found = _pairs.row(cfg, side, _BASE, scaled, (side, _BASE), bound=bound)
            rows.append(found | {"kind": kind, "factor": factor, "law": round(law, 4)})
            _pairs.keep(workdir, rows)
    done = _pairs.finish(cfg, workdir, "benchmarks.growth", rows)
    if all(row["ratio"] is not None for row in rows):
        picture.draw(workdir / "growth.png", rows)
    return done


def name(kind: Kind, factor: int) -> str:
    """Return the side's name."""
    return _BASE if factor == 1 else f"{kind} x{factor}"


def size(cfg: Config, kind: Kind, factor: int) -> dict[str, int]:
    """Return the sizes of a model and its batch with `factor` times as much of a kind."""
    sizes = {name: getattr(cfg, name) for name in ("layers", "width", "length", "rows", "vocabulary")} | {"devices": 1}
    sizes[kind] *= factor
    if kind == "length":
        sizes["rows"] //= factor
    return sizes


def start(sizes: Mapping[str, int], folder: Path) -> Start:
    """Write the model of these sizes and return how its training starts."""
    module = decoder.Decoder(
        decoder.gpt(sizes["layers"], sizes["width"], sizes["width"] // _HEAD, sizes["vocabulary"], sizes["length"])
    )
    own = folder / "-".join(str(value) for value in sizes.values())
    given = _families.written(_FAMILY, module, (sizes["rows"], sizes["length"]), own)
    more = {"family": _FAMILY, "learning_rate": _families.LEARNING_RATE, "devices": sizes["devices"]}
    return Start("_ours", "train", {"folder": given["folder"], "batch": given["batch"], **more})


def median(measured: _pairs.Measured, side: str) -> float:
    """Return the median seconds of a side's turns."""
    return float(np.median([turn.wall for turn in measured.turns[side]]))


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
