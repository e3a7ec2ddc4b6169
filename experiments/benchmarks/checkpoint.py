"""Benchmark saving and restoring a training state beside `torch.save` of the same bytes: how long the training stalls.

The state has the shapes of GPT-2's parameters and of Adam's two moments, all of them random numbers, because zeros
would be packed to nothing. Ours is a save of `checkpoint/store.py` (asynchronous, checked by sha256, on disk before it
counts) while products of 1024 × 1024 run, which stand for the training: `stall` is the time that the call blocks, plus
the part of the rest that these products lose beside the save. The peer's is torch.save and fsync, which block as long
as they take. `total` is until the state is on disk. `restore` reads it back from the page cache, verified on our side.
Both must give back what was saved, bit for bit, before anything is timed. `again` is our own save in a second process:
its ratio shows the noise, and it needs no torch.

Sides are processes that take turns (`_sides.py` says why); `_pairs.py` says what a busy machine is.

    python -m experiments.benchmarks.checkpoint --workdir runs/checkpoint     # 3 GB of disk, removed at the end

Needs torch (`.[benchmarks]` says how), except for `--peers again`. Nothing has been measured on an idle machine yet;
the results go to `history.jsonl` (`--history PATH`: to another file; `--history none`: to none).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from experiments.benchmarks import _pairs
from experiments.benchmarks._sides import Start, Turn
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.models.language import decoder

Peer = Literal["torch", "again"]
_STATES = 3  # parameters and two moments
_TIMES = ("stall", "total", "restore")


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The model whose state is saved, and the peers."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    peers: tuple[Peer, ...] = ("torch",)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse an empty model or comparison."""
        super().__post_init__()
        check_least(self, layers=1, width=1, heads=1, vocabulary=1, seed=0)
        if not self.peers:
            raise ConfigError("peers must name at least one")


def config() -> Config:
    """Return GPT-2 small's sizes: 1.49 GB."""
    return Config()


def debug() -> Config:
    """Return one pair of a state of some kilobytes, beside our own save."""
    small: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "vocabulary": 64, "peers": ("again",)}
    return Config(**small, pairs=1, allow_busy=True, history=None)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure, print the table; return the rows, also written to results.json."""
    _pairs.check(cfg, cfg.peers, needs=("torch",))
    given = {"shapes": shapes(cfg), "seed": cfg.seed}
    starts = {
        side: Start(
            "_torch" if side == "torch" else "_ours", "save", given | {"folder": str((workdir / side).absolute())}
        )
        for side in ("ours", *cfg.peers)
    }
    measured, facts = _pairs.compare(cfg, starts, workdir / "logs", same)
    rows = [
        _pairs.row(cfg, kind, peer, measured, ("ours", peer), seconds=partial(seconds, kind))
        for peer in cfg.peers
        for kind in _TIMES
    ]
    size = {
        side: {name: found[name] for name in ("bytes", "disk_bytes", "resident_gb")} for side, found in facts.items()
    }
    more = {} if measured is None else {"ours": medians(measured.turns["ours"])}
    return _pairs.finish(
        cfg, workdir, "benchmarks.checkpoint", rows, sizes=size, parts=more, turns=_pairs.as_data(measured)
    )


def shapes(cfg: Config) -> list[list[int]]:
    """Return the shapes of all leaves of the state."""
    module = decoder.Decoder(decoder.gpt(cfg.layers, cfg.width, cfg.heads, cfg.vocabulary))
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return [list(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(boxed))] * _STATES


def same(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise NumericError unless every side saved as many bytes and gave back what it had saved."""
    for side, found in facts.items():
        if found["bytes"] != facts["ours"]["bytes"] or not found["same"]:
            raise NumericError(
                f"{side} saved {found['bytes']} bytes ({facts['ours']['bytes']} here) and gave back "
                f"{'the same' if found['same'] else 'other'} values; nothing is timed"
            )


def seconds(kind: str, turn: Turn) -> float:
    """Return what a turn says of its stall, its total or its restore."""
    taken: float = turn.found[f"{kind}_s"]
    return taken


def medians(turns: list[Turn]) -> dict[str, float]:
    """Return the medians of the parts of our save."""
    return {
        name: float(np.median([turn.found[name] for turn in turns])) for name in ("blocked_s", "beside", "disk_bytes")
    }


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
