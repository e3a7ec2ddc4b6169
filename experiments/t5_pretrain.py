"""T5's pretraining: an encoder-decoder writes the spans that were left out of a text, on any corpus.

Paper: Raffel et al. 2020 (T5). Idea: 15 % of the tokens are left out in spans of three on average, each leaving one
sentinel; the decoder writes the spans between their sentinels. Targets are short, so a step costs less than one that
writes the whole text, and what is learnt serves every task that turns a text into a text. Spans are drawn anew at
every visit.

    ./launch.sh local experiments.t5_pretrain --config demo        # Python's own documentation, on any machine
    ./launch.sh local experiments.t5_pretrain --config t5_small --data.kind tfds --data.name wiki40b/en
    ./launch.sh local experiments.t5_pretrain --config config --data.kind jsonl --data.path corpus/

`experiments.t5_translate --init.from WORKDIR` opens what this leaves.
Presets: `config` (T5 base, trained as the baseline of section 3.1 but on the spans of section 3.7), `t5_small`,
`t5_v1_1_base`, `demo`, `debug`.
Hardware: demo needs two cores; T5 base one 80 GB GPU for days (`--accumulate`), or a pod.
Expected: of demo, on the validation split, a perplexity of 59.9 on the targets (by frequencies alone: 287); without the
sentinels and ends, a quarter of the targets, 210 (544), and 8.6 % of that text right (by the commonest token: 7.5 %),
after 615 CPU-seconds (37 minutes, on two cores shared with others). The paper-scale presets were not run here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from fm_jax import run as command_line
from fm_jax.checkpoint.store import Store
from fm_jax.core import mesh as meshes
from fm_jax.core import sharding
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, Params
from fm_jax.data import corpus, loader, source
from fm_jax.data.device import prefetch
from fm_jax.data.span_corruption import SpanCorruption
from fm_jax.evals import metrics, report, results, runner, unigram
from fm_jax.models.language import encoder_decoder
from fm_jax.objectives.seq2seq import seq2seq
from fm_jax.optim import optimizer as optimizers
from fm_jax.optim import schedule
from fm_jax.train import log, loop, state
from fm_jax.train.hooks import Hook
from fm_jax.train.step import make_train_step

_COUNTED = 2_000  # rows of the training split whose targets the baseline counts


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run; the schedule spans `fit.num_steps`."""

    model: encoder_decoder.Config
    fit: loop.FitConfig
    learning_rate: float
    data: source.Config = source.Config()
    data_dir: Path | None = None  # where corpora and their tokens are kept; None: in the work directory
    length: int = 512  # tokens of the corrupted text; targets follow from it (114 of 512)
    density: float = 0.15  # share of the tokens that are left out
    mean_span: float = 3.0  # tokens that are left out at once, on average
    workers: int = 0  # processes that read ahead
    schedule: Literal["rsqrt", "linear", "cosine", "constant"] = "rsqrt"  # rsqrt holds the rate while it warms up
    warmup: float = 10_000 / 2**19  # share of the steps
    optimizer: optimizers.Config = optimizers.Config(name="adafactor", clip_norm=None)
    mesh: meshes.MeshConfig = meshes.MeshConfig()
    batch_size: int = 128  # rows a step, over all devices
    accumulate: int = 1  # parts a step's batch is worked through in
    z_loss: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share of the steps, at least 0 and below 1, not {self.warmup}")


def config() -> Config:
    """Return the baseline of T5 base: 2^19 steps of 128 rows, Adafactor at 1/sqrt(max(step, 10^4)), dropout 0.1.

    Raffel et al. 2020, sections 3.1.1 and 3.1.2. 0.01 is the rate of the first 10^4 steps.
    """
    model = replace(encoder_decoder.with_dropout(encoder_decoder.t5_base(), 0.1), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(2**19, log_every=100, eval_every=10_000, save_every=5_000)
    return Config(model, fit, 1e-2)


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
        replace(encoder_decoder.t5(2, 128, 4, 512, 32, vocab_size=2048), max_length=64),
        loop.FitConfig(1_500, log_every=20, eval_every=300, save_every=500),
        1e-2,
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
    data = source.Config(only=("json", "wsgiref", "email"))
    return Config(model, fit, 1e-3, data, length=32, warmup=0.5, batch_size=8)


CONFIGS: dict[str, Callable[[], Config]] = {
    "config": config,
    "t5_small": t5_small,
    "t5_v1_1_base": t5_v1_1_base,
    "demo": demo,
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, float]:
    """Pretrain, evaluate on the whole validation split, and return (and write to results.json) what was measured."""
    mesh = meshes.make_mesh(cfg.mesh)
    if cfg.batch_size // cfg.accumulate % sharding.batch_ways(mesh):
        raise ConfigError(
            f"batch_size {cfg.batch_size} / accumulate {cfg.accumulate} does not divide over "
            f"{sharding.batch_ways(mesh)} shards (mesh.data × mesh.fsdp)"
        )
    found = corpus.prepare(
        cfg.data,
        cfg.data_dir or workdir / "data",
        vocab_size=cfg.model.vocab_size,
        splits=("train", "validation"),
        scheme="t5",
    )
    found.tokenizer.save(workdir / "tokenizer")
    place = {"host": jax.process_index(), "hosts": jax.process_count()}

    def rows(split: str) -> SpanCorruption:
        return SpanCorruption(
            found.tokens(split), found.tokenizer, cfg.length, density=cfg.density, mean_span=cfg.mean_span
        )

    train, validation = rows("train"), rows("validation")
    batches = loader.Batches(train, cfg.batch_size, seed=cfg.seed, workers=cfg.workers, **place)
    epoch = loader.Epoch(validation, cfg.batch_size // cfg.accumulate, **place)

    model, key = encoder_decoder.EncoderDecoder(cfg.model), jax.random.key(cfg.seed)
    loss = seq2seq(model.apply, z_loss=cfg.z_loss)
    evaluate = runner.make_eval_step(loss)
    marks = np.array([found.tokenizer.end_id, *found.tokenizer.sentinels])

    def text_only(batch: Batch) -> Batch:
        return {**batch, "weights": batch["weights"] * ~jax.numpy.isin(batch["targets"], marks)}

    def make_params() -> tuple[Params, Params]:
        tokens = np.zeros((cfg.batch_size, train.target_length), np.int32)
        read = np.zeros((cfg.batch_size, cfg.length), np.int32)
        return state.init_params(lambda key: model.init(key, tokens, read, mutable=["params"])["params"], key, mesh), {}

    plan = schedule.Config(
        kind=cfg.schedule,
        peak=cfg.learning_rate,
        num_steps=cfg.fit.num_steps,
        warmup_steps=int(cfg.warmup * cfg.fit.num_steps),
        start_ratio=1.0 if cfg.schedule == "rsqrt" else 0.0,
    )
    tx = optimizers.make(cfg.optimizer, schedule.make(plan), jax.eval_shape(make_params)[0])

    def create(params: Params, frozen: Params) -> state.TrainState:
        return state.create(params, tx, frozen=frozen, ema=False)

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        sums = runner.totals(evaluate, now.params, prefetch(iter(epoch), sharding.batch_sharding(mesh)))
        nll, count = sums["nll"]
        return {
            "validation/nll": nll / count,
            "validation/perplexity": metrics.perplexity(nll, count),
            "validation/accuracy": sums["accuracy"][0] / count,
        }

    with Store(workdir / "checkpoints", metric="validation/nll", meta={"config": to_dict(cfg)}) as store:
        begun = loop.start(create, make_params, mesh, store=store, batches=batches)
        writer = log.writers(workdir, step=int(begun.step), num_steps=cfg.fit.num_steps, tensorboard=True)
        done = loop.fit(
            cfg.fit,
            make_train_step(loss, tx, key=key, accumulate=cfg.accumulate),
            begun,
            batches,
            mesh=mesh,
            store=store,
            writer=writer,
            hooks=[Hook(validate, cfg.fit.eval_every)],
            work=loop.Work(cfg.batch_size, "rows"),
            trace_dir=workdir / "trace",
        )
        writer.close()
    with jax.set_mesh(mesh):
        found_now = validate(cfg.fit.num_steps, done)
        read = partial(prefetch, sharding=sharding.batch_sharding(mesh))
        text = runner.totals(evaluate, done.params, map(text_only, read(iter(epoch))))
        known = frequencies(train, cfg.model.vocab_size)
        trivial = unigram.measure(known, asked, read(iter(epoch)))
        known -= np.log(1 - np.exp(known[marks]).sum())  # as one that knows where the text is
        trivial_text = unigram.measure(known, asked, map(text_only, read(iter(epoch))))
    measured = {name.removeprefix("validation/"): value for name, value in found_now.items()} | trivial
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
    command_line.main(run, CONFIGS, resumable=("fit.log_every", "fit.save_every", "fit.profile_*", "mesh.*", "workers"))
