"""Text classification: finetune a pretrained encoder or decoder on texts or pairs of texts, by one of five methods.

Papers: Radford et al. 2018 (pretrain, then finetune the full model with a new head), Devlin et al. 2019 (BERT's head),
Hu et al. 2022 (LoRA), Howard & Ruder 2018 (frozen lower layers). Idea: the classifier starts from the pretrained
parameters. `--method` chooses which of them are trained:

    scratch   all of them, randomly initialised: the baseline without pretraining
    probe     only the new head
    lora      the head and low-rank updates of the matrices named by `lora.targets`
    full      all parameters
    frozen    all but the embeddings and the first `frozen_layers` layers

    python -m experiments.language.text_classify --init.from runs/gpt2 --method lora --data.path reviews
    python -m experiments.language.text_classify --init.from bert --data.path mnli --data.second hypothesis --export out
    python -m experiments.language.text_classify --init.from runs/quickstart/pretrain    # the docstring task

`--init.from` is the work directory of an `lm_pretrain` or `bert_pretrain` run, a checkpoint folder, or OWNER/NAME.
`--data.path` is a folder of train, validation and test files (JSON lines, CSV, TSV or Parquet, see
`fm_jax/README.md`); each row has a "text" and a "label", which is text, a whole number, or true or false.
`--export` writes a folder that `transformers` opens, with LoRA's updates merged. The updates alone are in its folder
`adapter`, for `peft`. A decoder can be exported with `--head last` only.
Hardware and time: two cores and half a minute with the quickstart's model; one 24 GB GPU for BERT base or GPT-2 124M.
Expected: the quickstart compares the five methods; its tables are in `experiments/README.md`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fm_jax import cli
from fm_jax.core import files, tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Params
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import labelled
from fm_jax.evals import runner
from fm_jax.evals.report import results
from fm_jax.hub import adapter, families
from fm_jax.hub import pretrained as public
from fm_jax.peft import lora as adapters
from fm_jax.tasks import language, text_classifier
from fm_jax.tasks.init import Init, resumes
from fm_jax.tasks.text_classifier import Setup
from fm_jax.train import loop, stage


@dataclass(frozen=True, kw_only=True)
class Config(text_classifier.Config):
    """One finetuning run."""

    init: Init = Init(Path("runs/lm_pretrain"))
    data: labelled.Config = labelled.Config()
    labels: int = 0  # training examples per class; 0: all
    export: Path | None = None  # folder to write for transformers; it must not exist yet

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        if self.labels < 0:
            raise ConfigError(f"labels must be at least 0 (0 means all), not {self.labels}")


def config() -> Config:
    """Return full finetuning on all labels of the built-in task."""
    return Config()


def debug() -> Config:
    """Return two steps on the model of `lm_pretrain --config debug --workdir runs/lm_pretrain_debug`."""
    init = Init(Path("runs/lm_pretrain_debug"))
    return Config(init=init, labels=2, fit=loop.FitConfig(2), length=16, batch_size=8)


def check_export(setup: Setup) -> None:
    """Raise before any computation if the classifier could not be exported."""
    fields = families.writing(setup.model).fields(setup.model)
    public.check_form(setup.model, fields | {"pad_token_id": setup.tokenizer.special("pad")})


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Finetune, evaluate on validation and test, and write results.json (and the adapter for LoRA)."""
    if cfg.export:
        files.check_target(cfg.export, CheckpointError)
    mesh = stage.open_mesh(cfg)
    pretrained = language.load(cfg.init.source, **cfg.init.options, shapes=resumes(workdir))
    task = labelled.load(cfg.data, cfg.data_dir or workdir / "data")
    few = docstrings.few(task.train, cfg.labels, seed=cfg.seed) if cfg.labels else task.train
    setup = Setup(pretrained, task.classes, cfg, mesh)
    setup.check(cfg.method)
    if cfg.export:
        check_export(setup)
    splits = {"train": few, "validation": task.validation, "test": task.test}
    rows = {name: setup.rows(examples, name) for name, examples in splits.items()}
    meta = {"config": to_dict(cfg)}
    params, trained = setup.fit(cfg.method, cfg.learning_rate, rows["train"], cfg.seed, workdir, meta=meta)
    measured: dict[str, Any] = {
        split: text_classifier.scores(setup.probabilities(params, rows[split]), rows[split])
        for split in ("validation", "test")
    }
    measured["trained_parameters"] = tree.count(trained)
    results.write(workdir / "results.json", measured)
    if cfg.export or cfg.method == "lora":
        params, trained = jax.tree.map(runner.gather, (params, trained))  # every process takes part
        if jax.process_index() == 0:
            write(cfg, workdir, setup, params, trained)
    return measured


def write(cfg: Config, workdir: Path, setup: Setup, params: Params, trained: Params) -> None:
    """Write the LoRA adapter and the folder for transformers, as configured."""
    if cfg.method == "lora":
        adapters.save(workdir / "adapter.safetensors", trained, cfg.lora)
    if cfg.export:
        public.save(cfg.export, setup.model, params, setup.tokenizer, labels=setup.classes)
    if cfg.export and cfg.method == "lora":
        options: dict[str, Any] = {"rank": cfg.lora.rank, "alpha": cfg.lora.alpha}
        options |= {"base": cfg.init.source, "revision": cfg.init.revision}
        adapter.save(cfg.export / "adapter", setup.model, trained, **options)


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=(*stage.RESUMABLE, "export"))
