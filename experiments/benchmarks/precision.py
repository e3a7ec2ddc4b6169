"""Benchmark float32 products on the CPU at the highest precision: the error that it removes, the time that it takes.

XLA on the CPU adds some 700 products in one float32 accumulator. With `jax.default_matmul_precision("highest")`,
`fm_jax/ops/matmul.py` adds long sums in blocks. Errors are measured on products of normal numbers, against float64 and
beside NumPy's library; time is that of a forward pass of a checkpoint, by processes that take turns (`_pairs.py`).

    ./launch.sh local experiments.benchmarks.precision      # SmolLM2, fetched by experiments.fetch --name smollm2
    ./launch.sh local experiments.benchmarks.precision --model models/llama

No torch is needed. What the error does to a checkpoint with massive activations is tested in
`tests/real/test_smollm2.py` against a float64 run.
Hardware: two idle cores, a minute. Expected: the section Benchmarks of `experiments/README.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from experiments.benchmarks import _pairs
from experiments.benchmarks._sides import Start
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.data.packages import cache
from fm_jax.evals.report import report
from fm_jax.hub import pretrained
from fm_jax.models.language import decoder
from fm_jax.ops.matmul import flat_dot_general

_SIDES = ("highest", "default")


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The products, and the model whose forward pass is timed."""

    model: Path | None = cache.place("smollm2")  # a decoder; none: a tiny one with random weights
    length: int = 256  # tokens of the forward pass
    sums: tuple[int, ...] = (192, 384, 768, 1536, 3072, 6144)  # how many products are added
    seeds: int = 3

    def __post_init__(self) -> None:
        """Refuse an empty measurement."""
        super().__post_init__()
        check_least(self, length=1, seeds=1)
        if not self.sums or min(self.sums) < 1:
            raise ConfigError(f"sums must name at least one number above 0, not {self.sums}")


def config() -> Config:
    """Return the fetched SmolLM2."""
    return Config()


def debug() -> Config:
    """Return a tiny model and two short sums."""
    return Config(model=None, length=8, sums=(16, 800), seeds=1, pairs=1, allow_busy=True, history=None)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure errors and time; return them, also written to results.json."""
    _pairs.check(cfg, ())
    folder = cfg.model or write(workdir / "model")
    found = [errors(count, cfg.seeds) for count in cfg.sums]
    print(report.table(found, {"sum": "products added", "default": "default", "highest": "highest", "numpy": "NumPy"}))
    given = {"folder": str(folder.absolute()), "length": cfg.length}
    starts = {side: Start("_ours", "forward", given | {"precision": side}) for side in _SIDES}
    measured, facts = _pairs.compare(cfg, starts, workdir / "logs", agree)
    row = _pairs.row(cfg, "forward", "default", measured, ("highest", "default"))
    rows = [row | {"logits_apart": apart(facts)}]
    _pairs.keep(workdir, rows)
    turns = {"forward": _pairs.as_data(measured)}
    return _pairs.finish(cfg, workdir, "benchmarks.precision", rows, errors=found, turns=turns)


def errors(count: int, seeds: int) -> dict[str, float]:
    """Return the root mean square of the errors of sums of `count` products, each relative to that of the sums."""

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return flat_dot_general(left, right, (((1,), (0,)), ((), ())))

    squares: dict[str, list[float]] = {"default": [], "highest": [], "numpy": []}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, count), (count, 512)))
        exact = left.astype(np.float64) @ right.astype(np.float64)
        results = {"numpy": left @ right}
        for side in _SIDES:
            with jax.default_matmul_precision(side):
                results[side] = np.asarray(jax.jit(product)(left, right))
        for name, result in results.items():
            squares[name].append(float(np.mean((result - exact) ** 2) / np.mean(exact**2)))
    return {"sum": count} | {name: float(f"{np.sqrt(np.mean(values)):.3g}") for name, values in squares.items()}


def agree(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless both sides gave finite logits of the same shape."""
    shapes = {side: np.shape(found["logits"]) for side, found in facts.items()}
    if len(set(shapes.values())) > 1 or not all(np.isfinite(found["logits"]).all() for found in facts.values()):
        raise ConfigError(f"the logits are not finite, or of shapes {shapes}; give another model")


def apart(facts: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the root mean square of the difference between both sides' last logits."""
    highest, default = (np.array(facts[side]["logits"]) for side in _SIDES)
    return float(f"{np.sqrt(np.mean((highest - default) ** 2)):.3g}")


def write(folder: Path) -> Path:
    """Write a tiny model with random weights, and return its folder."""
    if not folder.exists():
        module = decoder.Decoder(decoder.gpt(2, 16, 2, 64, 64))
        boxed = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        pretrained.save(folder, module, meta.unbox(boxed))
    return folder


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
