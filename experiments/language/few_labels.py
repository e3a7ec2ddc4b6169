"""Few labels: finetune a pretrained model by several methods, beside TF-IDF, to see what pretraining is worth.

Papers: Radford et al. 2018 (finetune a pretrained model), Reimers & Gurevych 2019 (the mean of an encoder's states),
Hu et al. 2022 (LoRA). Idea: each method gets the same few labels, in several draws, and one learning rate from the same
grid, chosen on the validation split. So the difference to training from scratch, and to a baseline that knows no
language at all, is what the pretrained weights are worth.

    ./launch.sh local experiments.language.few_labels                       # MiniLM: which package has this docstring?
    ./launch.sh local experiments.language.few_labels --config boolq        # MiniLM: is the answer to a question yes?
    ./launch.sh local experiments.language.few_labels --config boolq_lora   # the same from SmolLM2, by LoRA

The checkpoints and questions come by `./launch.sh local experiments.fetch --name minilm,boolq,smollm2`. `--init.from`
takes any run or checkpoint folder, `--data.path` any folder of labelled texts (see `text_classify`). Each class gets
the same number of labels, whatever its share of the test split: beside accuracy, read macro-F1. Results: results.md,
accuracy.png.
Hardware: two cores, 20 to 60 CPU-minutes.
Expected: the tables in `experiments/README.md`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm_jax import cli
from fm_jax.data.packages import cache
from fm_jax.data.text import labelled
from fm_jax.evals.report import results
from fm_jax.tasks import few_labels, language, text_classifier
from fm_jax.tasks.few_labels import Protocol
from fm_jax.tasks.init import Init
from fm_jax.tasks.text_classifier import Setup
from fm_jax.train import loop, stage


@dataclass(frozen=True)
class Config:
    """The pretrained model, the task and the protocol."""

    init: Init
    finetune: text_classifier.Config  # method, learning rate and seed are set by the comparison
    data: labelled.Config = labelled.Config()
    protocol: Protocol = Protocol()


def config() -> Config:
    """Return the docstring task on an encoder, read by the mean of its states."""
    grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    finetune = text_classifier.Config(fit=loop.FitConfig(60), batch_size=16, length=48, head="mean")
    protocol = Protocol(("scratch", "probe", "lora", "full"), grid=grid)
    return Config(Init(cache.place("minilm")), finetune, protocol=protocol)


def _boolq() -> labelled.Config:
    return labelled.Config(cache.place("boolq"), text="question", second="passage")


def boolq() -> Config:
    """Return BoolQ on an encoder: whether the answer to a question on a passage is yes."""
    finetune = text_classifier.Config(fit=loop.FitConfig(80), batch_size=16, length=128, head="mean")
    grid = (1e-4, 3e-4, 1e-3)
    # One epoch. By accuracy the chosen rate was that of a model that answers yes to everything.
    protocol = Protocol(("probe", "full"), (640,), tuning_labels=640, grid=grid, criterion="macro_f1", test_texts=1_000)
    return Config(Init(cache.place("minilm")), finetune, _boolq(), protocol)


def boolq_lora() -> Config:
    """Return BoolQ on a decoder, by LoRA alone."""
    finetune = text_classifier.Config(fit=loop.FitConfig(40), batch_size=8, length=128, head="mean")
    # One epoch, at a rate that is not tuned; the criterion is TF-IDF's.
    protocol = Protocol(("lora",), (160,), grid=(1e-3,), criterion="macro_f1", test_texts=300)
    return Config(Init(cache.place("smollm2")), finetune, _boolq(), protocol)


def debug() -> Config:
    """Return two steps a run, on the model of `lm_pretrain --config debug --workdir runs/lm_pretrain_debug`."""
    finetune = text_classifier.Config(fit=loop.FitConfig(2), batch_size=8, length=16)
    protocol = Protocol(("probe", "full"), (2,), (0, 1), tuning_labels=2, grid=(1e-3, 1e-2), test_texts=40)
    return Config(Init(Path("runs/lm_pretrain_debug")), finetune, protocol=protocol)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Compare the methods, and write results.json, results.md and accuracy.png."""
    done = workdir / "results.json"
    if done.exists():
        print(f"already done: the results are in {done}; use another --workdir to run again")
        return results.read(done)
    pretrained = language.load(cfg.init.source, **cfg.init.options)
    task = labelled.load(cfg.data, cfg.finetune.data_dir or workdir / "data")
    setup = Setup(pretrained, task.classes, cfg.finetune, stage.open_mesh(cfg.finetune))
    for method in cfg.protocol.methods:
        setup.check(method)
    compared = few_labels.compare(cfg.protocol, setup, task, workdir / "parts")
    few_labels.draw(workdir / "accuracy.png", compared, "Test accuracy with few labels")
    (workdir / "results.md").write_text(few_labels.table(compared) + "\n")
    results.write(done, compared)
    print((workdir / "results.md").read_text())
    return compared


if __name__ == "__main__":
    cli.main(
        run, {"default": config, "boolq": boolq, "boolq_lora": boolq_lora, "debug": debug}, resumable=stage.RESUMABLE
    )
