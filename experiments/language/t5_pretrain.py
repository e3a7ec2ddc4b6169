"""T5 pretraining on any corpus: span corruption with an encoder-decoder.

Paper: Raffel et al. 2020 (T5). Idea: 15 % of the tokens are removed, in spans of three tokens on average. One sentinel
token replaces each span in the encoder's input; the decoder writes the removed spans, each after its sentinel. The
targets are short, so a step is cheap. The model can then be finetuned on any text-to-text task. Spans are drawn again
at every epoch.

    ./launch.sh local experiments.language.t5_pretrain --config demo        # Python's own documentation, on any machine
    ./launch.sh local experiments.language.t5_pretrain --config t5_small --data.kind tfds --data.name wiki40b/en
    ./launch.sh local experiments.language.t5_pretrain --data.kind jsonl --data.path corpus/
    ./launch.sh local experiments.language.t5_pretrain --init.from models/t5 --data.kind text --data.path corpus/

`--init.from` continues the pretraining of an encoder-decoder: the work directory of an earlier run, a checkpoint
folder, or OWNER/NAME. Its form and its tokenizer are used; of `model`, only max_length, dropout, dtype and remat count.
`experiments.language.t5_translate --init.from WORKDIR` finetunes the result.
Presets: `default` (T5 base, trained like the baseline of section 3.1 but with the spans of section 3.7), `t5_small`,
`t5_v1_1_base`, `demo`, `debug`.
Hardware: `demo` needs two cores. T5 base needs one 80 GB GPU for days (`--accumulate`), or a pod.
Expected with `demo`, on the validation split: perplexity 59.9 on the targets (unigram: 287). A quarter of the targets
are sentinels and end tokens; without them the perplexity is 210 (unigram: 544) and the accuracy 8.4 % (most frequent
token: 7.5 %). This took 577 CPU-seconds (15 minutes on two cores shared with other programs). The paper-scale presets
were not run here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from fm_jax import cli
from fm_jax.checkpoint import surgery
from fm_jax.core.config import check_least, to_dict
from fm_jax.core.types import Batch, Params
from fm_jax.data.text import corpus, documents
from fm_jax.data.text.span_corruption import SpanCorruption
from fm_jax.evals import metrics, runner
from fm_jax.evals.baselines import unigram
from fm_jax.evals.report import report, results
from fm_jax.models.language import encoder_decoder
from fm_jax.objectives.seq2seq import seq2seq
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import language
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import log, loop, stage, state

_COUNTED = 2_000  # training rows whose targets the baseline counts


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    model: encoder_decoder.Config  # with init.from, only max_length, dropout, dtype and remat are used
    init: Init = Init()
    data: documents.Config = documents.Config()
    length: int = 512  # tokens of the corrupted text; it sets the target length (114 for 512)
    density: float = 0.15  # share of the tokens that are removed
    mean_span: float = 3.0  # mean tokens per removed span
    schedule: Literal["rsqrt", "linear", "cosine", "constant"] = "rsqrt"  # rsqrt: constant during warm-up
    warmup: float = 10_000 / 2**19  # share of the steps
    optimizer: optimizers.Config = optimizers.Config(name="adafactor", clip_norm=None)
    batch_size: int = 128  # rows per step, over all devices
    z_loss: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        check_least(self, length=1)


def config() -> Config:
    """Return the baseline of T5 base: 2^19 steps of 128 rows, Adafactor at 1/sqrt(max(step, 10^4)), dropout 0.1.

    Raffel et al. 2020, sections 3.1.1 and 3.1.2. 0.01 is the learning rate of the first 10^4 steps.
    """
    model = replace(encoder_decoder.with_dropout(encoder_decoder.t5_base(), 0.1), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(2**19, log_every=100, eval_every=10_000, save_every=5_000)
    return Config(model=model, fit=fit, learning_rate=1e-2)


def t5_small() -> Config:
    """Return T5 small with the same recipe."""
    model = replace(encoder_decoder.with_dropout(encoder_decoder.t5_small(), 0.1), dtype="bfloat16", remat="dots")
    return replace(config(), model=model)


def t5_v1_1_base() -> Config:
    """Return the final recipe (section 3.7: a million steps of 2,048 rows), for version 1.1, which has no dropout."""
    model = replace(encoder_decoder.t5_v1_1_base(), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(1_000_000, log_every=100, eval_every=10_000, save_every=5_000)
    return replace(config(), model=model, fit=fit, warmup=0.01, batch_size=2_048, accumulate=16)


def demo() -> Config:
    """Return the preset for two cores and eight minutes, on Python's documentation."""
    return Config(
        model=replace(encoder_decoder.t5(2, 128, 4, 512, 32, vocab_size=2048), max_length=64),
        fit=loop.FitConfig(1_500, log_every=20, eval_every=300, save_every=500),
        learning_rate=1e-2,
        length=96,
        schedule="linear",
        warmup=0.05,
        optimizer=optimizers.Config(name="muon"),
        batch_size=32,
    )


def debug() -> Config:
    """Return two steps of a tiny model on the documentation of three packages."""
    model = replace(encoder_decoder.tiny(), vocab_size=480)
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    data = documents.Config(only=("json", "wsgiref", "email"))
    return Config(model=model, fit=fit, learning_rate=1e-3, data=data, length=32, warmup=0.5, batch_size=8)


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "t5_small": t5_small,
    "t5_v1_1_base": t5_v1_1_base,
    "demo": demo,
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, float]:
    """Pretrain, evaluate on the full validation split, and return the metrics, also written to results.json."""
    mesh, resumed = stage.open_mesh(cfg), resumes(workdir)
    earlier = language.continued(cfg.init, encoder_decoder.EncoderDecoder, mesh=mesh, resumed=resumed)
    shape = cfg.model
    if earlier is not None:  # its positions are relative, so any length can be trained
        shape = replace(language.trained_form(earlier.module.cfg, cfg.model), max_length=cfg.model.max_length)
    prepared = corpus.prepare(
        cfg.data,
        cfg.data_dir or workdir / "data",
        vocab_size=shape.vocab_size,
        splits=("train", "validation"),
        scheme="t5",
        given=earlier.tokenizer if earlier else None,
    )
    prepared.tokenizer.save(workdir / "tokenizer")

    def rows(split: str) -> SpanCorruption:
        return SpanCorruption(
            prepared.tokens(split), prepared.tokenizer, cfg.length, density=cfg.density, mean_span=cfg.mean_span
        )

    train, validation = rows("train"), rows("validation")
    batches = stage.batches(cfg, train)

    model, key = encoder_decoder.EncoderDecoder(shape), jax.random.key(cfg.seed)
    loss = seq2seq(model.apply, z_loss=cfg.z_loss)
    evaluate = runner.make_eval_step(loss)
    markers = np.array([prepared.tokenizer.end_id, *prepared.tokenizer.sentinels])

    def text_only(batch: Batch) -> Batch:
        return {**batch, "weights": batch["weights"] * ~jax.numpy.isin(batch["targets"], markers)}

    inputs = tuple(np.zeros((cfg.batch_size, length), np.int32) for length in (train.target_length, cfg.length))

    layout = state.layout(model, inputs, mesh)

    def make_params() -> tuple[Params, Params]:
        if earlier is not None and not resumed:
            return surgery.load(layout, earlier.params), {}
        return state.init_params(model, inputs, key, mesh), {}

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        sums = runner.totals(evaluate, now.params, stage.one_pass(cfg, validation, mesh))
        nll, count = sums["nll"]
        return {
            "nll": nll / count,
            "perplexity": metrics.perplexity(nll, count),
            "accuracy": sums["accuracy"][0] / count,
        }

    rates = stage.rates(cfg, cfg.schedule, start_ratio=1.0 if cfg.schedule == "rsqrt" else 0.0)
    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, rates, make_params),
        make_params=make_params,
        batches=batches,
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg), **language.inherited(earlier)},
        files=language.kept(prepared.tokenizer),
        layout=layout,
        validate=validate,
        metric="nll",
        work=loop.Work(cfg.batch_size, "rows"),
    )
    with jax.set_mesh(mesh):
        measured = validate(cfg.fit.num_steps, done)
        read = partial(stage.one_pass, cfg, validation, mesh)
        text = runner.totals(evaluate, done.params, map(text_only, read()))
        log_frequencies = frequencies(train, shape.vocab_size)
        baseline = unigram.measure(log_frequencies, targets, read())
        # renormalised over text tokens: this baseline knows where the markers are
        log_frequencies -= np.log(1 - np.exp(log_frequencies[markers]).sum())
        baseline_text = unigram.measure(log_frequencies, targets, map(text_only, read()))
    measured |= baseline
    measured["text_perplexity"] = metrics.perplexity(*text["nll"])
    measured["text_accuracy"] = text["accuracy"][0] / text["accuracy"][1]
    measured |= {f"text_{name}": value for name, value in baseline_text.items()}
    results.write(workdir / "results.json", measured)
    if jax.process_index() == 0:
        report.loss_curves(
            workdir / "loss.png",
            log.curves(workdir / "metrics.jsonl", {"training": "train/nll", "validation": "validation/nll"}),
            title="Span corruption",
            ylabel="nats per target token",
            lines={"unigram": float(np.log(measured["unigram_perplexity"]))},
        )
    return measured


def targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the targets [B, T] of a batch and their weights."""
    return batch["targets"], batch["weights"]


def frequencies(train: SpanCorruption, vocab_size: int) -> np.ndarray:
    """Return the log frequencies [V] of the tokens in the training split's targets, sentinels included."""
    indices = range(0, len(train), max(1, len(train) // _COUNTED))
    picked = (train[index] for index in indices)
    return unigram.count((row["targets"][row["weights"] > 0] for row in picked), vocab_size)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=stage.RESUMABLE)
