"""Convert a run or a public checkpoint to a folder that `transformers` opens with equal results.

The source is a checkpoint folder (also with the older flax_model.msgpack), a GGUF file, OWNER/NAME, or the work
directory of a run:
lm_pretrain, bert_pretrain, t5_pretrain, t5_translate, text_classify (with LoRA merged), an image classifier,
mae_pretrain, or simclr_pretrain (its backbone only). Its checkpoints are all that is read of a run: it may have been
moved, and its data, and the model that it started from, may be gone.

    ./launch.sh local experiments.hub.hub_convert --source runs/quickstart/pretrain --target public/mine
    ./launch.sh local experiments.hub.hub_convert --source old/flax-gpt2 --target new/gpt2 --dtype bfloat16
    ./launch.sh local experiments.hub.hub_convert --source models/llama --adapter models/llama-lora --target merged
    ./launch.sh local experiments.hub.hub_convert --source smollm2.Q4_K_M.gguf --target smollm2

Every written number is read again and compared before the command ends. A model that no class of `transformers`
computes is refused, and the message names the difference. `experiments.hub.hub_verify` then compares the outputs of all
layers.
Hardware: memory for one copy of the model; tensors are written and read again one at a time. Time: limited by
the disk.
"""

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax import cli
from fm_jax.core import files, tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Featured, Params, backbone
from fm_jax.evals.report import report, results
from fm_jax.hub import families, generation, pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import stored
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.tasks import adapted, language
from fm_jax.tasks import vision as vision_models
from fm_jax.tasks.init import EarlierRun, open_run

_SHOWN = 0.5  # seconds between progress lines
_IN_TOKENIZER = {  # files whose content is in tokenizer.json or tokenizer_config.json
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "vocab.json", "vocab.txt",
}  # fmt: skip
_OF_THE_FILE = {"_commit_hash", "_name_or_path", "torch_dtype", "transformers_version", "use_cache"}  # not the model's


@dataclass(frozen=True)
class Config:
    """The source, the target and the format."""

    source: Path = Path("runs/lm_pretrain")  # a run's work directory, a checkpoint folder or GGUF file, or OWNER/NAME
    target: Path = Path("converted")  # folder to write; it must not exist yet
    dtype: Dtype | None = None  # stored dtype; none: the source's
    adapter: Path | None = None  # LoRA folder of `peft` to merge into the weights
    revision: str | None = None  # commit, branch or tag of OWNER/NAME
    ignore: tuple[str, ...] = ()  # unknown fields of the config.json files that change no result
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
    files.check_target(cfg.target, CheckpointError)
    started = time.perf_counter()
    print(f"reading {cfg.source}", flush=True)
    model, dtype, folder = read(cfg)
    if cfg.adapter:
        print(f"merging {cfg.adapter}", flush=True)
        model = adapted.merged(model, cfg.adapter, ignore=cfg.ignore)
    read_at = time.perf_counter()
    print(f"writing {cfg.target}: {tree.count(model.params):,} parameters as {dtype}", flush=True)
    pretrained.save(
        cfg.target, model.module, model.params, model.tokenizer, labels=model.labels,
        preprocessing=model.preprocessing, generation=model.generation, header=model.header, dtype=dtype,
        shard_bytes=cfg.shard_bytes,
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
    whole = folder is not None and (folder / "config.json").is_file()  # not a single file that holds everything
    left = left_behind(folder, cfg.target, model.module) if folder and whole else []
    if left:
        print(f"left behind: {', '.join(left)}")
    results.write(workdir / "results.json", {**measured, "left_behind": left})
    return measured


def read(cfg: Config) -> tuple[Pretrained, Dtype, Path | None]:
    """Open the source; return the model, the dtype to store it in, and the checkpoint folder unless it is a run."""
    if (run := open_run(cfg.source, cfg.revision, cfg.step, ignore=cfg.ignore)) is not None:
        return of_run(run), cfg.dtype or "float32", None
    folder = pretrained.find(cfg.source, cfg.revision)
    # of matrices only: running statistics and counters of batch normalisation have their own dtypes
    specs = stored.open_weights(folder).specs.values()
    dtypes = {spec.dtype for spec in specs if len(spec.shape) > 1 and "float" in spec.dtype}
    same: Dtype | None = next((name for name in ("float32", "bfloat16", "float16") if dtypes == {name}), None)
    model = pretrained.load(folder, dtype=same or "float32", ignore=cfg.ignore)
    model = replace(model, module=pretrained.computing(model.module, "float32"))
    return model, cfg.dtype or same or "float32", folder


def left_behind(source: Path, target: Path, module: nn.Module) -> list[str]:
    """Return the files, fields of config.json and weights of a checkpoint folder that are not in the one made of it.

    Of fields only those that say something are named; of tensors no buffers, such as masks, and no copies of others.
    """
    read = [rf"{kind.shard}|{re.escape(kind.single)}(?:\.index\.json)?" for kind in stored.KINDS]
    names = {path.name for path in source.iterdir() if not re.fullmatch(rf"{'|'.join(read)}|\..*", path.name)}
    names -= {path.name for path in target.iterdir()}
    if (target / "tokenizer.json").exists():
        names -= _IN_TOKENIZER
    theirs, ours = (Fields.open(folder / "config.json").data for folder in (source, target))
    if (target / generation.FILE).exists():
        ours |= Fields.open(target / generation.FILE).data
    lost = {name for name, value in theirs.items() if value} - ours.keys() - _OF_THE_FILE
    known = families.writing(module).table(module)
    written = {*stored.open_weights(target).specs, *(copy for copy, _ in known.tied)}
    weights = {
        name
        for name, spec in stored.open_weights(source).specs.items()
        if name.endswith(".weight") or (name.endswith(".bias") and len(spec.shape) == 1)
        if known.current(name) not in written
    }
    return [*sorted(names), *(f"config.json: {name}" for name in sorted(lost)), *sorted(weights)]


def of_run(run: EarlierRun) -> Pretrained:
    """Return the trained model of a run.

    Raises:
        CheckpointError: this version cannot build the run's model.
    """
    if isinstance(backbone(run.model()), Featured):
        return vision_models.of_run(run)
    return language.of_run(run)


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
