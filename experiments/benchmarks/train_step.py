"""Benchmark the training step of every family beside `transformers` on torch, eager and compiled, same weights.

A step is forward and backward pass, global norm, clipping at 1 and AdamW, in float32, without dropout. Both sides open
one folder that our hub has written, and read one batch. Before anything is timed their first losses must agree within
1e-4; the gradients' norms are reported. The peer uses sdpa attention, fused AdamW and, for `compile`, torch.compile.
BERT's peer computes the head at every position, ours at the masked ones. `again` is our own step in a second process:
its ratio shows the noise, and it needs no torch.

The bound is the time of the step's matrix products and convolutions (counted in our step's jaxpr, forward and backward,
scans included, `_products.py`) at the rate of a 2048 × 2048 product of XLA's, measured in turn with the sides. Sides
are processes that take turns, A B C, C B A, … (`_sides.py` says why); `_pairs.py` says what a busy machine is.

    python -m experiments.benchmarks.train_step --workdir runs/train_step
    python -m experiments.benchmarks.train_step --workdir runs/train_step --families gpt2,bert --peers eager

Needs torch and transformers (`.[benchmarks]`), except for `--peers again`. Measured: the section Benchmarks of
`experiments/README.md`; the results go to `history.jsonl` (`--history PATH`: to another file; `--history none`: to
none).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from experiments.benchmarks import _families, _pairs
from experiments.benchmarks._families import FAMILIES
from experiments.benchmarks._sides import Start
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError

Name = Literal["gpt2", "llama", "bert", "t5", "resnet18", "resnet50", "efficientnet_b0", "vit", "mae"]
Peer = Literal["eager", "compile", "again"]
_PRODUCT = "product"


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The families and the peers."""

    families: tuple[Name, ...] = get_args(Name)
    peers: tuple[Peer, ...] = ("eager", "compile")
    small: bool = False  # models of the same form that compile in seconds; their times mean nothing
    product: int = 2048  # size of the product whose rate gives the bound

    def __post_init__(self) -> None:
        """Refuse an empty comparison."""
        super().__post_init__()
        check_least(self, product=1)
        if not self.families or not self.peers:
            raise ConfigError("families and peers must name at least one each")


def config() -> Config:
    """Return all families beside eager and compiled torch."""
    return Config()


def debug() -> Config:
    """Return one pair of two small models, beside our own step."""
    return Config(
        families=("gpt2", "resnet18"), peers=("again",), small=True, pairs=1, product=256, allow_busy=True, history=None
    )


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure every family, print the table; return the rows, also written to results.json."""
    _pairs.check(cfg, cfg.peers)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    turns: dict[str, Any] = {}
    for name in cfg.families:
        family = FAMILIES[name]
        peers = [peer for peer in cfg.peers if peer != "compile" or not family.uncompiled]
        skipped += [f"{name} compiled: {family.uncompiled}"] * (len(peers) < len(cfg.peers))
        if not peers:
            continue
        given = _families.write(name, workdir / "models" / name, small=cfg.small)
        starts = {side: start(side, name, given) for side in ("ours", *peers)}
        starts[_PRODUCT] = Start("_ours", "product", {"size": cfg.product})
        measured, facts = _pairs.compare(cfg, starts, workdir / "logs" / name, partial(agree, name))
        bound = None if measured is None else facts["ours"]["flops"] / rate(measured)
        for peer in peers:
            rows.append(_pairs.row(cfg, name, peer, measured, ("ours", peer), bound=bound) | told(facts, peer))
            _pairs.keep(workdir, rows)
        turns[name] = _pairs.as_data(measured)
    return _pairs.finish(cfg, workdir, "benchmarks.train_step", rows, skipped=skipped, turns=turns)


def start(side: str, name: str, given: Mapping[str, str]) -> Start:
    """Return how a side starts: ours and `again` alike, the others with torch."""
    more: dict[str, Any] = {"folder": given["folder"], "learning_rate": _families.LEARNING_RATE}
    if side in ("ours", "again"):
        cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        return Start("_ours", "train", more | {"family": name, "batch": given["batch"], "cache": cache})
    more |= {"kind": FAMILIES[name].theirs, "inputs": given["inputs"], "compiled": side == "compile"}
    return Start("_torch", "train", more)


def agree(name: str, facts: Mapping[str, Mapping[str, float]]) -> None:
    """Raise NumericError unless all sides had the same loss in the first step."""
    _families.check_losses(name, {side: found["loss"] for side, found in facts.items() if side != _PRODUCT})


def rate(measured: _pairs.Measured) -> float:
    """Return the FLOP/s of the product that was measured in turn with the sides."""
    return float(np.median([turn.found["flops"] / turn.wall for turn in measured.turns[_PRODUCT]]))


def told(facts: Mapping[str, Mapping[str, float]], peer: str) -> dict[str, float]:
    """Return what the preparation says of our side and of the peer."""
    kept = ("loss", "grad_norm", "first_step_s", "resident_gb")
    sides = {"ours": facts["ours"], "peer": facts[peer]}
    told = {f"{side}_{name}": found[name] for side, found in sides.items() for name in kept}
    return told | {"gflops": round(facts["ours"]["flops"] / 1e9, 3)}


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
