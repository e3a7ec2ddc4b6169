"""Hand a model over: any checkpoint that opens here, as a folder that `transformers` opens with equal results.

Sources are folders as `transformers` writes them, of old Flax files too (flax_model.msgpack), or OWNER/NAME; and work
directories of this project's runs: lm_pretrain, bert_pretrain, t5_pretrain, t5_translate, text_classify (LoRA merged
in), and those of images: the classifiers, mae_pretrain, and of simclr_pretrain the backbone.

    ./launch.sh local experiments.hub.hub_convert --source runs/quickstart/pretrain --target public/mine
    ./launch.sh local experiments.hub.hub_convert --source old/flax-gpt2 --target new/gpt2 --dtype bfloat16

What is written is read again and compared, number by number, before the command says that it is done; what a class of
`transformers` would compute otherwise is refused by name. `experiments.hub.hub_verify` then proves the two sides equal.
Hardware: memory for the model once; it is written and read again one tensor at a time.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax import cli
from fm_jax.core import tree
from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Featured, Params, backbone
from fm_jax.data.text import labelled
from fm_jax.evals.report import report, results
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.files import stored
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.language.classifier import Classifier
from fm_jax.peft import lora
from fm_jax.tasks import language, text_classifier
from fm_jax.tasks import vision as vision_models
from fm_jax.tasks.init import EarlierRun, open_run

_SHOWN = 0.5  # seconds between two lines of progress


@dataclass(frozen=True)
class Config:
    """What to convert into what."""

    source: Path = Path("runs/lm_pretrain")  # work directory of a run, a folder, or OWNER/NAME
    target: Path = Path("converted")  # folder to write; must not exist yet
    dtype: Dtype | None = None  # to store in; None: as the source has it
    revision: str | None = None  # of a checkpoint fetched by name
    step: str = "best"  # of a run: "best", "last" or a number
    shard_bytes: int = 5_000_000_000  # most that a file holds

    def __post_init__(self) -> None:
        """Refuse files that cannot hold a thing."""
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes must be above 0, not {self.shard_bytes}")


def config() -> Config:
    """Return the defaults."""
    return Config()


def debug() -> Config:
    """Return the conversion of what `lm_pretrain --config debug --workdir runs/lm_pretrain_debug` leaves."""
    return Config(Path("runs/lm_pretrain_debug"), Path("runs/lm_pretrain_debug_public"))


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Read, write, read again and compare; return (and write to results.json) what it was and took."""
    if cfg.target.exists():
        raise CheckpointError(f"--target {cfg.target} exists already; give another folder, or move it away")
    started = time.perf_counter()
    print(f"reading {cfg.source}", flush=True)
    found, dtype = read(cfg)
    read_at = time.perf_counter()
    print(f"writing {cfg.target}: {tree.count(found.params):,} parameters as {dtype}", flush=True)
    pretrained.save(
        cfg.target, found.module, found.params, found.tokenizer, labels=found.labels,
        preprocessing=found.preprocessing, dtype=dtype, shard_bytes=cfg.shard_bytes,
    )  # fmt: skip
    written_at = time.perf_counter()
    tensors, count = check(cfg.target, found.module, found.params, dtype)
    data = families.writing(found.module).fields(found.module)
    measured = {
        "model": data["architectures"][0],
        "family": data["model_type"],
        "parameters": tree.count(found.params),
        "tensors": tensors,
        "bytes": count,
        "dtype": dtype,
        "read_seconds": read_at - started,
        "write_seconds": written_at - read_at,
        "check_seconds": time.perf_counter() - written_at,
    }
    print(report.table([measured], list(measured)))
    results.write(workdir / "results.json", measured)
    return measured


def read(cfg: Config) -> tuple[Pretrained, Dtype]:
    """Open the source; return what it holds and the dtype to store it in."""
    if (run := open_run(cfg.source, cfg.revision, cfg.step)) is not None:
        return of_run(run), cfg.dtype or "float32"
    folder = pretrained.find(cfg.source, cfg.revision)
    # of the matrices: running statistics and counters of batch normalisation have dtypes of their own
    specs = stored.open_weights(folder).specs.values()
    kinds = {spec.dtype for spec in specs if len(spec.shape) > 1 and "float" in spec.dtype}
    same: Dtype | None = next((kind for kind in ("float32", "bfloat16", "float16") if kinds == {kind}), None)
    found = pretrained.load(folder, dtype=same or "float32")
    return replace(found, module=pretrained.computing(found.module, "float32")), cfg.dtype or same or "float32"


def of_run(run: EarlierRun) -> Pretrained:
    """Return what a run of this project trained.

    Raises:
        CheckpointError: a run of a model that cannot be made here.
    """
    module = run.model()
    if isinstance(backbone(module), Featured):
        return vision_models.of_run(run)
    return _classifier(run) if isinstance(module, Classifier) else language.of_run(run)


def _classifier(run: EarlierRun) -> Pretrained:
    """Read what text_classify trained, together with what it left frozen."""
    config = run.config
    base = language.load(config["init"]["from"], revision=config["init"]["revision"])
    classes = labelled.load(from_dict(labelled.Config, config["data"]), run.workdir / "data").classes
    module, _ = language.classifier(base, classes, config["head"])
    combine = text_classifier.combine(config["method"], from_dict(lora.Config, config["lora"]))
    return Pretrained(module, run.params(combine), base.tokenizer, tuple(classes))


def check(folder: Path, module: nn.Module, params: Params, dtype: Dtype) -> tuple[int, int]:
    """Read every parameter's tensor of a folder again and compare it; return how many there are, and their bytes.

    Raises:
        CheckpointError: a number that is not what it should be: a disk that does not keep what it is given.
    """
    weights, said = stored.open_weights(folder), time.perf_counter()
    names = families.writing(module).table(module)
    wanted = table.specs(names, families.abstract(module, dtype))
    total = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in wanted.values())
    done = number = 0
    for number, (name, array) in enumerate(table.write(names, params), 1):
        whole = tuple(slice(0, size) for size in array.shape)
        found = weights.read(name, whole)
        if found.dtype != np.dtype(wanted[name].dtype) or not np.array_equal(found, array.astype(found.dtype)):
            raise CheckpointError(f"{folder}: {name} does not hold what was written; try another disk")
        done += found.nbytes
        if time.perf_counter() - said > _SHOWN or done == total:
            said = time.perf_counter()
            print(f"checking {number} tensors, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", flush=True)
    return number, done


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
