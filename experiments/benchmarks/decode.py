"""Benchmark greedy decoding of a GPT-2 beside `transformers.generate` with a dynamic and a static cache.

Both sides open one folder of random weights that our hub has written and continue the same prompts, in float32. A turn
is one call of `generate`: the prompt and all new tokens. Before anything is timed the tokens must be the same; where a
row differs, the two tokens must have had the same logit (within 1e-3) in our model, which happens with random weights,
and the rest of that row is not compared. `again` is our own decoding in a second process: its ratio shows the noise,
and it needs no torch.

The bound is the time to read, for every new token, all weights (of the position table nothing, of the token table all,
because it is the head) and the filled part of the cache, at the bandwidth with which all cores read large arrays,
measured in turn with the sides. Sides are processes that take turns, A B C, C B A, … (`_sides.py` says why);
`_pairs.py` says what a busy machine is.

    python -m experiments.benchmarks.decode --workdir runs/decode
    python -m experiments.benchmarks.decode --workdir runs/decode --batches 1 --peers dynamic

Needs torch and transformers (`.[benchmarks]`), except for `--peers again`. Nothing has been measured on an idle machine
yet; the results go to `history.jsonl` (`--history PATH`: to another file; `--history none`: to none).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from experiments.benchmarks import _pairs
from experiments.benchmarks._sides import Start
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.hub import pretrained
from fm_jax.models.language import decoder

Peer = Literal["dynamic", "static", "again"]
_TIE = 1e-3  # difference of two logits below which either token may be chosen
_READ = "bandwidth"


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The model, the prompts and the peers."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    batches: tuple[int, ...] = (1, 8, 64)  # rows of prompts
    prompt: int = 128  # tokens of every prompt
    new_tokens: int = 256
    peers: tuple[Peer, ...] = ("dynamic", "static")
    read: int = 1024  # megabytes whose reading gives the bandwidth; more than the last cache holds

    def __post_init__(self) -> None:
        """Refuse an empty model or comparison."""
        super().__post_init__()
        check_least(self, layers=1, width=1, heads=1, vocabulary=1, prompt=1, new_tokens=1, read=1)
        if not self.batches or min(self.batches) < 1 or not self.peers:
            raise ConfigError(f"batches and peers must name at least one each, batches at least 1, not {self.batches}")


def config() -> Config:
    """Return GPT-2 small's sizes."""
    return Config()


def debug() -> Config:
    """Return one pair of a tiny model, beside our own decoding."""
    tiny = Config(layers=2, width=16, heads=2, vocabulary=64, batches=(2,), prompt=4, new_tokens=4, read=8)
    return Config(**vars(tiny) | {"peers": ("again",), "pairs": 1, "allow_busy": True, "history": None})


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure every batch size, print the table; return the rows, also written to results.json."""
    _pairs.check(cfg, cfg.peers)
    folder = workdir / "model"
    write(cfg, folder)
    rows: list[dict[str, Any]] = []
    turns: dict[str, Any] = {}
    for batch in cfg.batches:
        prompts = workdir / f"prompts_{batch}.npy"
        shape = (batch, cfg.prompt)
        np.save(prompts, np.random.default_rng(batch).integers(0, cfg.vocabulary, shape).astype(np.int32))
        starts = {side: start(side, cfg, folder, prompts) for side in ("ours", *cfg.peers)}
        starts[_READ] = Start("_memory", "bandwidth", {"megabytes": cfg.read})

        def check(facts: Mapping[str, Mapping[str, Any]], prompts: Path = prompts) -> None:
            for peer in cfg.peers:
                agree(folder, np.load(prompts), facts["ours"]["tokens"], facts[peer]["tokens"], peer)

        measured, facts = _pairs.compare(cfg, starts, workdir / "logs" / f"batch_{batch}", check)
        least = cfg.new_tokens * (facts["ours"]["weight_bytes"] + facts["ours"]["cache_bytes"])
        bound = None if measured is None else least / bandwidth(measured)
        name = f"gpt2 batch {batch}"
        for peer in cfg.peers:
            row = _pairs.row(cfg, name, peer, measured, ("ours", peer), bound=bound)
            for side, found in (("ours", facts["ours"]), ("peer", facts[peer])):
                row |= {f"{side}_resident_gb": found["resident_gb"]}
                if row[side] is not None:
                    row |= {f"{side}_ms_a_token": round(1e3 * row[side] / cfg.new_tokens, 3)}
            rows.append(row)
            _pairs.keep(workdir, rows)
        turns[name] = _pairs.as_data(measured)
    return _pairs.finish(cfg, workdir, "benchmarks.decode", rows, turns=turns)


def write(cfg: Config, folder: Path) -> None:
    """Write a model with random weights."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps of another size
    longest = max(1024, cfg.prompt + cfg.new_tokens)
    module = decoder.Decoder(decoder.gpt(cfg.layers, cfg.width, cfg.heads, cfg.vocabulary, longest))
    boxed = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    pretrained.save(folder, module, meta.unbox(boxed))


def start(side: str, cfg: Config, folder: Path, prompts: Path) -> Start:
    """Return how a side starts: ours and `again` alike, the others with torch."""
    given = {"folder": str(folder.absolute()), "prompts": str(prompts.absolute()), "new_tokens": cfg.new_tokens}
    if side in ("ours", "again"):
        return Start("_ours", "decode", given | {"cache": jax.config.jax_compilation_cache_dir})  # type: ignore[attr-defined]
    return Start("_torch", "decode", given | {"static": side == "static"})


def agree(folder: Path, prompts: np.ndarray, ours: list[list[int]], theirs: list[list[int]], peer: str) -> None:
    """Raise NumericError unless the tokens [B, N] are the same up to a tie in every row.

    Args:
        folder: the model, opened only where a row differs.
        prompts: the prompts [B, T].
        ours: our tokens.
        theirs: the peer's.
        peer: its name.
    """
    mine, other = np.array(ours), np.array(theirs)
    if mine.shape != other.shape:
        raise NumericError(f"{peer} gave tokens {list(other.shape)} where ours gave {list(mine.shape)}")
    different = np.flatnonzero((mine != other).any(axis=1))
    if not len(different):
        return
    loaded = pretrained.load(folder)
    for row in different:
        place = int(np.argmax(mine[row] != other[row]))
        text = np.concatenate([prompts[row], mine[row, :place]])[None]
        hidden = loaded.module.apply({"params": loaded.params}, text, method="hidden")
        logits = np.asarray(loaded.module.apply({"params": loaded.params}, hidden[:, -1], method="logits"))[0]
        tokens = int(mine[row, place]), int(other[row, place])
        if not abs(float(logits[tokens[0]] - logits[tokens[1]])) <= _TIE:
            raise NumericError(
                f"{peer}: row {row} differs from ours at new token {place}: {tokens[1]} instead of {tokens[0]}, whose "
                f"logits are {logits[tokens[1]]:.5f} and {logits[tokens[0]]:.5f}; nothing is timed"
            )


def bandwidth(measured: _pairs.Measured) -> float:
    """Return the bytes a second of the reading that was measured in turn with the sides."""
    return float(np.median([turn.found["bytes"] / turn.wall for turn in measured.turns[_READ]]))


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
