"""EleutherAI's lm-evaluation-harness on a decoder of ours: any of its tasks, or yours, with its own numbers.

Source: Gao et al., "A framework for few-shot language model evaluation", lm_eval 0.4.13 (the extra `harness`).
Idea: a number that is compared with others' must be made as theirs was. The harness asks, we answer: how likely a
continuation is, how likely a whole text, and what comes next (`fm_jax/evals/scores/harness.py`; a test holds it against
the harness's own torch backend on the same weights).

    python -m experiments.language.harness --model runs/quickstart/pretrain    # two tasks made of Python itself
    python -m experiments.language.harness --model models/gpt2 --include_path mine --tasks quiz,stories --num_fewshot 5
    python -m experiments.language.harness --model openai-community/gpt2 --shipped true --tasks lambada_openai,hellaswag

`--model` is a pretraining run's work directory, a folder as `transformers` writes it, or OWNER/NAME. `--include_path`
is a folder of the harness's task files (a task file may name code, which runs: take them from whom you trust); without
it there are two tasks made of the running Python: `docstrings` (which package is this docstring of?) and `documents`
(how likely are whole documents?). `--shipped true` adds the thousands of tasks that lm_eval brings, whose data it
fetches; otherwise nothing is fetched.
Hardware and time: two cores and a minute or two for the quickstart's model and both own tasks.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fm_jax import cli
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import documents
from fm_jax.evals.report import report, results
from fm_jax.evals.scores import harness
from fm_jax.generate import sample
from fm_jax.generate.decode import generate
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.language.decoder import Decoder
from fm_jax.tasks import language

OWN = ("docstrings", "documents")


@dataclass(frozen=True)
class Config:
    """Which model answers which tasks."""

    model: Path = Path("runs/lm_pretrain")  # work directory of a run, a folder, or OWNER/NAME
    tasks: tuple[str, ...] = OWN
    include_path: Path | None = None  # folder of task files; None: the two own tasks
    shipped: bool = False  # also the tasks that lm_eval brings; finding them takes most of a minute
    num_fewshot: int | None = None  # examples before each question; None: what the task says
    limit: int = 0  # documents of each task; 0 for all
    batch_size: int = 16
    dtype: Dtype | None = None  # of the computation; None: the run's own, float32 for a folder
    data: documents.Config = documents.Config()  # what `documents` is made of
    seed: int = 0  # of what is drawn where a task draws

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        if not self.tasks:
            raise ConfigError("tasks is empty; name some, separated by commas")
        for name, least in (("limit", 0), ("batch_size", 1), ("num_fewshot", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")


def config() -> Config:
    """Return the two own tasks, whole."""
    return Config()


def debug() -> Config:
    """Return a few documents of the own tasks."""
    data = documents.Config(only=("json", "wsgiref", "email"))
    return Config(Path("runs/lm_pretrain_debug"), limit=4, batch_size=4, data=data)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Answer all tasks, print the table, and return (and write to results.json) {task: {metric: value}}."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm_eval's bootstrap would fork a process that has threads
    if not cfg.shipped:  # read by the libraries when they are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"the harness is not installed ({error}); install fm_jax[harness]") from error

    folder = cfg.include_path or own_tasks(cfg, workdir)
    if not folder.is_dir():
        raise DataError(f"--include_path {folder} is no folder; give the one that holds the task files")
    manager = TaskManager(include_path=str(folder), include_defaults=cfg.shipped)
    if unknown := sorted(set(cfg.tasks) - set(manager.all_tasks)):
        there = ", ".join(manager.all_tasks[:8]) or "none"
        raise DataError(f"no task is named {unknown[0]!r} under {folder}; there are {there}")
    found = language.load(cfg.model, dtype=cfg.dtype)
    if not isinstance(found.module, Decoder) or found.tokenizer is None:
        raise ConfigError(f"--model {cfg.model} is a {type(found.module).__name__}; the harness asks decoders")

    answerer = harness.language_model(
        found.module, found.params, found.tokenizer, writer(found, cfg.seed), batch_size=cfg.batch_size
    )
    answers = lm_eval.simple_evaluate(
        answerer,
        tasks=list(cfg.tasks),
        num_fewshot=cfg.num_fewshot,
        limit=cfg.limit or None,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=manager,
    )
    measured = {task: _plain(entry) for task, entry in answers["results"].items()}
    print(table(measured, answers["n-shot"]))
    results.write(workdir / "results.json", measured)
    return measured


def writer(found: Pretrained, seed: int) -> harness.Write:
    """Return what continues the harness's prompts."""
    tokenizer, key = found.tokenizer, jax.random.key(seed)
    assert tokenizer is not None

    def write(prompts: harness.Prompts) -> tuple[Any, Any]:
        how = prompts.options
        cfg = sample.Config(how.temperature, how.top_k, how.top_p, repetition_penalty=how.repetition_penalty)
        out = generate(
            found.module,
            found.params,
            prompts.tokens,
            prompts.lengths,
            max_new_tokens=how.max_new_tokens,
            cfg=cfg,
            key=key,
            seeds=prompts.seeds,
            eos_id=tokenizer.end_id,
            stop=prompts.stop,
        )
        return out.tokens, out.lengths

    return write


def own_tasks(cfg: Config, workdir: Path) -> Path:
    """Write the own tasks that are asked for, data and task files, and return their folder."""
    folder, data_dir = (workdir / "tasks").absolute(), workdir / "data"
    asked = [name for name in OWN if name in cfg.tasks]
    rows: list[dict[str, Any]] = []
    if "docstrings" in asked:
        test = docstrings.load("test", data_dir)
        order = np.random.default_rng(0).permutation(len(test))  # so that a limit sees all classes
        rows = [{"text": test.texts[i], "label": int(test.labels[i])} for i in order]
        form: dict[str, Any] = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}\nPackage:",
            "doc_to_choice": list(test.classes),
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        _write_task(folder, "docstrings", rows, form)
    if "documents" in asked:
        texts = documents.documents(cfg.data, "validation", data_dir)
        rows = [{"text": texts[i]} for i in range(len(texts))]
        measures = [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")]
        form = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        _write_task(folder, "documents", rows, form | {"metric_list": measures})
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table(measured: dict[str, dict[str, float]], shots: dict[str, int]) -> str:
    """Return one row a task and metric: value, standard error, examples before each question."""
    rows = [
        {
            "task": task,
            "metric": name,
            "value": value,
            "error": entry.get(_error(name)),
            "shots": shots.get(task),
        }
        for task, entry in measured.items()
        for name, value in entry.items()
        if "_stderr" not in name
    ]
    heads = {"task": "task", "metric": "metric", "value": "value", "error": "± standard error", "shots": "shots"}
    return report.table(rows, heads)


def _error(metric: str) -> str:
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _plain(entry: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a task's results; of the names (metric,filter) the filter goes where it is "none"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in entry.items()
        if isinstance(value, int | float) and "," in name
    }


def _write_task(folder: Path, name: str, rows: list[dict[str, Any]], form: dict[str, Any]) -> None:
    """Write a task's documents and its file; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(json.dumps(head | {"test_split": "test"} | form, indent=1), "utf-8")


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug})
