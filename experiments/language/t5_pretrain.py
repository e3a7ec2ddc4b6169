"""T5's pretraining: an encoder-decoder writes the spans that were left out of a text, on any corpus.

Paper: Raffel et al. 2020 (T5). Idea: 15 % of the tokens are left out in spans of three on average, each leaving one
sentinel; the decoder writes the spans between their sentinels. Targets are short, so a step costs less than one that
writes the whole text, and what is learnt serves every task that turns a text into a text. Spans are drawn anew at
every visit.

    ./launch.sh local experiments.language.t5_pretrain --config demo        # Python's own documentation, on any machine
    ./launch.sh local experiments.language.t5_pretrain --config t5_small --data.kind tfds --data.name wiki40b/en
    ./launch.sh local experiments.language.t5_pretrain --data.kind jsonl --data.path corpus/

`experiments.language.t5_translate --init.from WORKDIR` opens what this leaves.
Presets: `default` (T5 base, trained as the baseline of section 3.1 but on the spans of section 3.7), `t5_small`,
`t5_v1_1_base`, `demo`, `debug`.
Hardware: demo needs two cores; T5 base one 80 GB GPU for days (`--accumulate`), or a pod.
Expected: of demo, on the validation split, a perplexity of 59.9 on the targets (by frequencies alone: 287); without the
sentinels and ends, a quarter of the targets, 210 (544), and 8.4 % of that text right (by the commonest token: 7.5 %),
after 577 CPU-seconds (15 minutes, on two cores shared with others). The paper-scale presets were not run here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from fm_jax import cli
from fm_jax.core.config import to_dict
from fm_jax.core.types import Batch, Params
from fm_jax.data.text import corpus, documents
from fm_jax.data.text.span_corruption import SpanCorruption
from fm_jax.evals import metrics, runner
from fm_jax.evals.baselines import unigram
from fm_jax.evals.report import report, results
from fm_jax.models.language import encoder_decoder
from fm_jax.objectives.seq2seq import seq2seq
from fm_jax.optim import optimizer as optimizers
from fm_jax.train import log, loop, stage, state

_COUNTED = 2_000  # rows of the training split whose targets the baseline counts


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    model: encoder_decoder.Config
    data: documents.Config = documents.Config()
    length: int = 512  # tokens of the corrupted text; targets follow from it (114 of 512)
    density: float = 0.15  # share of the tokens that are left out
    mean_span: float = 3.0  # tokens that are left out at once, on average
    schedule: Literal["rsqrt", "linear", "cosine", "constant"] = "rsqrt"  # rsqrt holds the rate while it warms up
    warmup: float = 10_000 / 2**19  # share of the steps
    optimizer: optimizers.Config = optimizers.Config(name="adafactor", clip_norm=None)
    batch_size: int = 128  # rows a step, over all devices
    z_loss: float = 1e-4


def config() -> Config:
    """Return the baseline of T5 base: 2^19 steps of 128 rows, Adafactor at 1/sqrt(max(step, 10^4)), dropout 0.1.

    Raffel et al. 2020, sections 3.1.1 and 3.1.2. 0.01 is the rate of the first 10^4 steps.
    """
    model = replace(encoder_decoder.with_dropout(encoder_decoder.t5_base(), 0.1), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(2**19, log_every=100, eval_every=10_000, save_every=5_000)
    return Config(model=model, fit=fit, learning_rate=1e-2)


def t5_small() -> Config:
    """Return the same recipe for T5 small."""
    model = replace(encoder_decoder.with_dropout(encoder_decoder.t5_small(), 0.1), dtype="bfloat16", remat="dots")
    return replace(config(), model=model)


def t5_v1_1_base() -> Config:
    """Return the final recipe (section 3.7: a million steps of 2,048 rows), for version 1.1, which has no dropout."""
    model = replace(encoder_decoder.t5_v1_1_base(), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(1_000_000, log_every=100, eval_every=10_000, save_every=5_000)
    return replace(config(), model=model, fit=fit, warmup=0.01, batch_size=2_048, accumulate=16)


def demo() -> Config:
    """Return the preset for two cores and eight minutes, on Python's own documentation."""
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
    """Return two steps of a tiny model on three packages' documentation."""
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
    """Pretrain, evaluate on the whole validation split, and return (and write to results.json) what was measured."""
    mesh = stage.open_mesh(cfg)
    found = corpus.prepare(
        cfg.data,
        cfg.data_dir or workdir / "data",
        vocab_size=cfg.model.vocab_size,
        splits=("train", "validation"),
        scheme="t5",
    )
    found.tokenizer.save(workdir / "tokenizer")

    def rows(split: str) -> SpanCorruption:
        return SpanCorruption(
            found.tokens(split), found.tokenizer, cfg.length, density=cfg.density, mean_span=cfg.mean_span
        )

    train, validation = rows("train"), rows("validation")
    batches = stage.batches(cfg, train)

    model, key = encoder_decoder.EncoderDecoder(cfg.model), jax.random.key(cfg.seed)
    loss = seq2seq(model.apply, z_loss=cfg.z_loss)
    evaluate = runner.make_eval_step(loss)
    marks = np.array([found.tokenizer.end_id, *found.tokenizer.sentinels])

    def text_only(batch: Batch) -> Batch:
        return {**batch, "weights": batch["weights"] * ~jax.numpy.isin(batch["targets"], marks)}

    inputs = tuple(np.zeros((cfg.batch_size, length), np.int32) for length in (train.target_length, cfg.length))

    def make_params() -> tuple[Params, Params]:
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
        meta={"config": to_dict(cfg)},
        layout=state.layout(model, inputs, mesh),
        validate=validate,
        metric="nll",
        work=loop.Work(cfg.batch_size, "rows"),
    )
    with jax.set_mesh(mesh):
        measured = validate(cfg.fit.num_steps, done)
        read = partial(stage.one_pass, cfg, validation, mesh)
        text = runner.totals(evaluate, done.params, map(text_only, read()))
        known = frequencies(train, cfg.model.vocab_size)
        trivial = unigram.measure(known, asked, read())
        known -= np.log(1 - np.exp(known[marks]).sum())  # as one that knows where the text is
        trivial_text = unigram.measure(known, asked, map(text_only, read()))
    measured |= trivial
    measured["text_perplexity"] = metrics.perplexity(*text["nll"])
    measured["text_accuracy"] = text["accuracy"][0] / text["accuracy"][1]
    measured |= {f"text_{name}": value for name, value in trivial_text.items()}
    results.write(workdir / "results.json", measured)
    if jax.process_index() == 0:
        report.loss_curves(
            workdir / "loss.png",
            log.curves(workdir / "metrics.jsonl", {"training": "train/nll", "validation": "validation/nll"}),
            title="Left-out spans",
            ylabel="nats per target token",
            lines={"unigram": float(np.log(measured["unigram_perplexity"]))},
        )
    return measured


def asked(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the targets [B, T] of a batch and their weights."""
    return batch["targets"], batch["weights"]


def frequencies(train: SpanCorruption, vocab_size: int) -> np.ndarray:
    """Return the log frequencies [V] of the training split's targets, sentinels included."""
    spread = range(0, len(train), max(1, len(train) // _COUNTED))
    picked = (train[index] for index in spread)
    return unigram.count((row["targets"][row["weights"] > 0] for row in picked), vocab_size)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=stage.RESUMABLE)
