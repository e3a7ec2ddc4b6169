"""Convert a run or a public checkpoint to a folder that `transformers` opens with equal results.

The source is a checkpoint folder (also with the older flax_model.msgpack), a GGUF file, OWNER/NAME, or the work
directory of a run:
lm_pretrain, bert_pretrain, t5_pretrain, t5_translate, text_classify (with LoRA merged), an image classifier,
mae_pretrain, or simclr_pretrain (its backbone only).

    ./launch.sh local experiments.hub.hub_convert --source runs/quickstart/pretrain --target public/mine
    ./launch.sh local experiments.hub.hub_convert --source old/flax-gpt2 --target new/gpt2 --dtype bfloat16
    ./launch.sh local experiments.hub.hub_convert --source smollm2.Q4_K_M.gguf --target smollm2

Every written number is read again and compared before the command ends. A model that no class of `transformers`
computes is refused, and the message names the difference. `experiments.hub.hub_verify` then compares the outputs of all
layers.
Hardware: memory for one copy of the model; tensors are written and read again one at a time. Time: limited by
the disk.
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
from fm_jax.tasks.init import EarlierRun, Init, open_run

_SHOWN = 0.5  # seconds between progress lines


@dataclass(frozen=True)
class Config:
    """The source, the target and the format."""

    source: Path = Path("runs/lm_pretrain")  # a run's work directory, a checkpoint folder or GGUF file, or OWNER/NAME
    target: Path = Path("converted")  # folder to write; it must not exist yet
    dtype: Dtype | None = None  # stored dtype; none: the source's
    revision: str | None = None  # commit, branch or tag of OWNER/NAME
    ignore: tuple[str, ...] = ()  # unknown fields of a folder's config.json that change no result
    step: str = "best"  # checkpoint of a run: "best", "last" or a step number
    shard_bytes: int = 5_000_000_000  # maximum size of one file

    def __post_init__(self) -> None:
        """Refuse an impossible file size."""
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes must be above 0, not {self.shard_bytes}")


def config() -> Config:
    """Return the defaults."""
    return Config()


def debug() -> Config:
    """Return the conversion of the run `lm_pretrain --config debug --workdir runs/lm_pretrain_debug`."""
    return Config(Path("runs/lm_pretrain_debug"), Path("runs/lm_pretrain_debug_public"))


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Read, write, read again and compare; return sizes and times, also written to results.json."""
    if cfg.target.exists():
        raise CheckpointError(f"--target {cfg.target} exists already; give another folder, or move it away")
    started = time.perf_counter()
    print(f"reading {cfg.source}", flush=True)
    model, dtype = read(cfg)
    read_at = time.perf_counter()
    print(f"writing {cfg.target}: {tree.count(model.params):,} parameters as {dtype}", flush=True)
    pretrained.save(
        cfg.target, model.module, model.params, model.tokenizer, labels=model.labels,
        preprocessing=model.preprocessing, dtype=dtype, shard_bytes=cfg.shard_bytes,
    )  # fmt: skip
    written_at = time.perf_counter()
    tensors, count = check(cfg.target, model.module, model.params, dtype)
    data = families.writing(model.module).fields(model.module)
    measured = {
        "model": data["architectures"][0],
        "family": data["model_type"],
        "parameters": tree.count(model.params),
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
    """Open the source; return the model and the dtype to store it in."""
    if (run := open_run(cfg.source, cfg.revision, cfg.step, ignore=cfg.ignore)) is not None:
        return of_run(run), cfg.dtype or "float32"
    folder = pretrained.find(cfg.source, cfg.revision)
    # of matrices only: running statistics and counters of batch normalisation have their own dtypes
    specs = stored.open_weights(folder).specs.values()
    dtypes = {spec.dtype for spec in specs if len(spec.shape) > 1 and "float" in spec.dtype}
    same: Dtype | None = next((name for name in ("float32", "bfloat16", "float16") if dtypes == {name}), None)
    model = pretrained.load(folder, dtype=same or "float32", ignore=cfg.ignore)
    return replace(model, module=pretrained.computing(model.module, "float32")), cfg.dtype or same or "float32"


def of_run(run: EarlierRun) -> Pretrained:
    """Return the trained model of a run.

    Raises:
        CheckpointError: this version cannot build the run's model.
    """
    module = run.model()
    if isinstance(backbone(module), Featured):
        return vision_models.of_run(run)
    return _classifier(run) if isinstance(module, Classifier) else language.of_run(run)


def _classifier(run: EarlierRun) -> Pretrained:
    """Read the classifier of a text_classify run, trained and frozen parameters together."""
    config = run.config
    start = from_dict(Init, config["init"])
    base = language.load(start.source, revision=start.revision, ignore=start.ignore)
    classes = labelled.load(from_dict(labelled.Config, config["data"]), run.workdir / "data").classes
    module, _ = language.classifier(base, classes, config["head"])
    combine = text_classifier.combine(config["method"], from_dict(lora.Config, config["lora"]))
    return Pretrained(module, run.params(combine), base.tokenizer, tuple(classes))


def check(folder: Path, module: nn.Module, params: Params, dtype: Dtype) -> tuple[int, int]:
    """Read all parameters of a folder again and compare them; return the number of tensors and bytes.

    Raises:
        CheckpointError: a stored number differs from the written one, as on a faulty disk.
    """
    weights, reported = stored.open_weights(folder), time.perf_counter()
    names = families.writing(module).table(module)
    wanted = table.specs(names, families.abstract(module, dtype))
    total = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in wanted.values())
    done = number = 0
    for number, (name, array) in enumerate(table.write(names, params), 1):
        full = tuple(slice(0, size) for size in array.shape)
        stored_array = weights.read(name, full)
        right_dtype = stored_array.dtype == np.dtype(wanted[name].dtype)
        if not right_dtype or not np.array_equal(stored_array, array.astype(stored_array.dtype)):
            raise CheckpointError(f"{folder}: {name} differs from what was written; try another disk")
        done += stored_array.nbytes
        if time.perf_counter() - reported > _SHOWN or done == total:
            reported = time.perf_counter()
            print(f"checking {number} tensors, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", flush=True)
    return number, done


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
