"""Evaluate a decoder with EleutherAI's lm-evaluation-harness: its tasks or your own, with its own metrics.

Source: Gao et al., "A framework for few-shot language model evaluation", lm_eval 0.4.13 (the extra `harness`).
Idea: published scores can be compared only if they are computed in the same way. The harness defines the tasks and
metrics; the model returns log-likelihoods of continuations and of full texts, and generated text
(`fm_jax/evals/scores/harness.py`). A test compares this with the harness's own torch backend on the same weights.

    python -m experiments.language.harness --model runs/quickstart/pretrain    # two tasks made of Python itself
    python -m experiments.language.harness --model models/gpt2 --include_path mine --tasks quiz,stories --num_fewshot 5
    python -m experiments.language.harness --model models/smollm2 --questions language_tests --tasks openbookqa,piqa
    python -m experiments.language.harness --model openai-community/gpt2 --shipped true --tasks lambada_openai,hellaswag

`--model` is a pretraining run's work directory, a checkpoint folder, or OWNER/NAME. `--include_path` is a folder of
task files for the harness. A task file can run code, so use only files that you trust. Without it there are two
built-in tasks, made from the Python that runs this: `docstrings` (which package does a docstring belong to?) and
`documents` (likelihood of documents). `--questions` is a folder of NAME.jsonl with a "question", its "choices" and the
number of the "answer" in each line (`experiments.fetch --name language_tests` writes one): five questions with their
answers come before each question, and every choice's text (`--form letter`: its letter) is scored. `--shipped true`
adds the thousands of tasks of lm_eval, which downloads their data; without it nothing is downloaded.
Hardware and time: two cores and one or two minutes for the quickstart's model and both built-in tasks.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import documents
from fm_jax.evals.report import report, results
from fm_jax.evals.scores import harness, harness_tasks
from fm_jax.generate import sample
from fm_jax.generate.decode import generate
from fm_jax.generate.text import ends
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.language.decoder import Decoder
from fm_jax.tasks import language

BUILT_IN = ("docstrings", "documents")


@dataclass(frozen=True)
class Config:
    """The model and its tasks."""

    model: Path = Path("runs/lm_pretrain")  # work directory of a run, a folder, or OWNER/NAME
    tasks: tuple[str, ...] = BUILT_IN
    include_path: Path | None = None  # folder of task files; none: the two built-in tasks
    questions: Path | None = None  # folder of NAME.jsonl, each a task of multiple-choice questions
    form: harness_tasks.Form = "text"  # questions: score the choices' texts, or their letters in a list
    shipped: bool = False  # also the tasks of lm_eval; finding them takes most of a minute
    num_fewshot: int | None = None  # examples before each question; none: the task's number
    limit: int = 0  # documents per task; 0: all
    batch_size: int = 16
    ignore: tuple[str, ...] = ()  # unknown fields of the folder's config.json that change no result
    dtype: Dtype | None = None  # computation dtype; none: the run's own, float32 for a folder
    data: documents.Config = documents.Config()  # data of the task `documents`
    seed: int = 0  # of sampling, for tasks that sample

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        if not self.tasks:
            raise ConfigError("tasks is empty; give task names separated by commas")
        if self.questions and self.include_path:
            raise ConfigError("questions and include_path both name the tasks; give one of them")
        if self.questions and (self.num_fewshot or 0) > harness_tasks.EXAMPLES:
            most = harness_tasks.EXAMPLES
            raise ConfigError(f"num_fewshot must be at most {most} with questions, not {self.num_fewshot}")
        check_least(self, limit=0, batch_size=1, seed=0)
        if self.num_fewshot is not None:
            check_least(self, num_fewshot=0)


def config() -> Config:
    """Return the two built-in tasks with all documents."""
    return Config()


def debug() -> Config:
    """Return a few documents of the built-in tasks."""
    data = documents.Config(only=("json", "wsgiref", "email"))
    return Config(Path("runs/lm_pretrain_debug"), limit=4, batch_size=4, data=data)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Evaluate all tasks, print the table, and return {task: {metric: value}}, also written to results.json."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm_eval's bootstrap would fork a process that has threads
    if not cfg.shipped:  # the libraries read this on import
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"the harness is not installed ({error}); install fm_jax[harness]") from error

    folder = cfg.include_path or own_tasks(cfg, workdir)
    if not folder.is_dir():
        raise DataError(f"--include_path {folder} is not a folder; give the folder that contains the task files")
    manager = TaskManager(include_path=str(folder), include_defaults=cfg.shipped)
    if unknown := sorted(set(cfg.tasks) - set(manager.all_tasks)):
        available = ", ".join(manager.all_tasks[:8]) or "none"
        raise DataError(f"there is no task {unknown[0]!r} in {folder}; available: {available}")
    pretrained = language.load(cfg.model, dtype=cfg.dtype, ignore=cfg.ignore)
    if not isinstance(pretrained.module, Decoder) or pretrained.tokenizer is None:
        raise ConfigError(f"--model {cfg.model} is a {type(pretrained.module).__name__}; the harness needs a decoder")

    answerer = harness.language_model(
        pretrained.module,
        pretrained.params,
        pretrained.tokenizer,
        writer(pretrained, cfg.seed),
        batch_size=cfg.batch_size,
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


def writer(pretrained: Pretrained, seed: int) -> harness.Write:
    """Return the function that generates continuations for the harness."""
    tokenizer, key = pretrained.tokenizer, jax.random.key(seed)
    assert tokenizer is not None
    closing = ends(tokenizer, pretrained.generation)

    def write(prompts: harness.Prompts) -> tuple[Any, Any]:
        options = prompts.options
        cfg = sample.Config(
            options.temperature, options.top_k, options.top_p, repetition_penalty=options.repetition_penalty
        )
        out = generate(
            pretrained.module,
            pretrained.params,
            prompts.tokens,
            prompts.lengths,
            max_new_tokens=options.max_new_tokens,
            cfg=cfg,
            key=key,
            seeds=prompts.seeds,
            eos_id=closing,
            stop=prompts.stop,
        )
        return out.tokens, out.lengths

    return write


def own_tasks(cfg: Config, workdir: Path) -> Path:
    """Write data and task files of the configured tasks, of questions or built-in, and return their folder."""
    folder, data_dir = (workdir / "tasks").absolute(), workdir / "data"
    if cfg.questions:
        harness_tasks.questions(cfg.questions, folder, cfg.tasks, cfg.form)
        return folder
    chosen = [name for name in BUILT_IN if name in cfg.tasks]
    rows: list[dict[str, Any]] = []
    if "docstrings" in chosen:
        test = docstrings.load("test", data_dir)
        order = np.random.default_rng(0).permutation(len(test))  # so that `limit` keeps all classes
        rows = [{"text": test.texts[i], "label": int(test.labels[i])} for i in order]
        form: dict[str, Any] = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}\nPackage:",
            "doc_to_choice": list(test.classes),
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        harness_tasks.write(folder, "docstrings", rows, form)
    if "documents" in chosen:
        texts = documents.documents(cfg.data, "validation", data_dir)
        rows = [{"text": texts[i]} for i in range(len(texts))]
        measures = [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")]
        form = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        harness_tasks.write(folder, "documents", rows, form | {"metric_list": measures})
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table(measured: dict[str, dict[str, float]], shots: dict[str, int]) -> str:
    """Return one row per task and metric: value, standard error, examples before each question."""
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
    """Return the numeric results of a task; names are "metric,filter", and the filter "none" is dropped."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in entry.items()
        if isinstance(value, int | float) and "," in name
    }


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug})
