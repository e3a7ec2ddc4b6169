"""Language-model pretraining on any corpus: next-token prediction with a decoder, on a laptop or a cluster.

Papers: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3), Touvron et al. 2023 (LLaMA).
Idea: a decoder learns to predict the next token of unlabelled text; every later task starts from it. As for GPT-3,
documents are joined with an end-of-text token and split into blocks of the context length. With `--apart true`,
attention does not cross from one document to another.

    ./launch.sh local experiments.language.lm_pretrain                      # Python's own documentation, on any machine
    ./launch.sh local experiments.language.lm_pretrain --config gpt2_small --data.kind tfds --data.name wiki40b/en
    ./launch.sh local experiments.language.lm_pretrain --config gpt2_small --data.kind jsonl --data.path corpus/
    ./launch.sh local experiments.language.lm_pretrain --data.kind text --data.path input.txt

`--data.kind` has the kinds of files of `fm_jax/README.md`. A folder of ready-made tokens has its own tokenizer.
Presets: `default` (6 layers, width 512, 8 heads, vocabulary 10,000, Adam at 1e-3), `gpt2_*`, `gpt3_*`, `llama2_*`,
`llama3_8b`.
Hardware: the default runs anywhere. `gpt2_small` needs one 80 GB GPU (half a million tokens per step, with
`--accumulate`); `gpt3_6_7b` and larger need a pod (`--mesh.fsdp`, `--mesh.tensor`).
Expected: the quickstart's language model is trained by this module; its results are in `experiments/README.md`. The
paper-scale presets were not run here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from fm_jax import cli
from fm_jax.core.config import to_dict
from fm_jax.core.types import Params
from fm_jax.data.text import corpus, documents
from fm_jax.evals import metrics, runner
from fm_jax.evals.report import results
from fm_jax.models.language import decoder
from fm_jax.objectives.language import next_token
from fm_jax.optim import optimizer as optimizers
from fm_jax.train import loop, profile, stage, state


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    model: decoder.Config
    data: documents.Config = documents.Config()
    apart: bool = False  # no attention between the documents of a block
    schedule: Literal["cosine", "linear", "rsqrt", "wsd", "constant"] = "cosine"
    warmup: float = 0.01  # share of the steps
    batch_size: int = 512  # sequences of `model.max_length` per step, over all devices
    z_loss: float = 0.0  # weight of the squared log partition function
    chunk: int = 0  # tokens whose logits are in memory at once; 0: all
    ema_decay: float | None = None  # keep an EMA of the parameters and evaluate it; none: no EMA


def paper(model: decoder.Config, learning_rate: float, batch_size: int, accumulate: int) -> Config:
    """Return the recipe of Brown et al. 2020, appendix B: 300 B tokens, AdamW (0.9, 0.95), clip 1, decay 0.1.

    Two differences: the cosine decays to a tenth over the whole run (theirs over the first 260 B tokens), and the batch
    size is constant (theirs grows at first).
    """
    tokens = batch_size * model.max_length
    fit = loop.FitConfig(int(3e11) // tokens, log_every=10, eval_every=2000, save_every=1000)
    adam = optimizers.Config(weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8)
    full_size = replace(model, dtype="bfloat16", remat="dots")
    return Config(
        model=full_size,
        fit=fit,
        learning_rate=learning_rate,
        optimizer=adam,
        batch_size=batch_size,
        accumulate=accumulate,
        warmup=0.00125,
    )


def config() -> Config:
    """Return a Transformer of 29 M parameters with Adam at 1e-3, sized for Python's documentation."""
    fit = loop.FitConfig(2000, eval_every=200, save_every=200)
    adam = optimizers.Config(name="adam")
    return Config(
        model=decoder.lm10k(), fit=fit, learning_rate=1e-3, optimizer=adam, schedule="constant", batch_size=16
    )


# Batch sizes: half a million tokens for GPT-2, table 2.1 of the paper for GPT-3, four million tokens for LLaMA (LLaMA
# 2, table 1). Learning rates: GPT-3's table 2.1 (also for GPT-2's sizes), LLaMA 2's table 1, LLaMA 3's table 3.
CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "gpt2_small": lambda: paper(decoder.gpt2_small(), 6e-4, 512, 16),
    "gpt2_medium": lambda: paper(decoder.gpt2_medium(), 3e-4, 512, 32),
    "gpt2_large": lambda: paper(decoder.gpt2_large(), 2.5e-4, 512, 64),
    "gpt2_xl": lambda: paper(decoder.gpt2_xl(), 2e-4, 512, 64),
    "gpt3_small": lambda: paper(decoder.gpt3_small(), 6e-4, 256, 8),
    "gpt3_medium": lambda: paper(decoder.gpt3_medium(), 3e-4, 256, 8),
    "gpt3_large": lambda: paper(decoder.gpt3_large(), 2.5e-4, 256, 8),
    "gpt3_xl": lambda: paper(decoder.gpt3_xl(), 2e-4, 512, 8),
    "gpt3_2_7b": lambda: paper(decoder.gpt3_2_7b(), 1.6e-4, 512, 8),
    "gpt3_6_7b": lambda: paper(decoder.gpt3_6_7b(), 1.2e-4, 1024, 8),
    "gpt3_13b": lambda: paper(decoder.gpt3_13b(), 1e-4, 1024, 8),
    "gpt3_175b": lambda: paper(decoder.gpt3_175b(), 6e-5, 1536, 8),
    "llama2_7b": lambda: paper(decoder.llama2_7b(), 3e-4, 1024, 8),
    "llama2_13b": lambda: paper(decoder.llama2_13b(), 3e-4, 1024, 8),
    "llama2_70b": lambda: paper(decoder.llama2_70b(), 1.5e-4, 1024, 8),
    "llama3_8b": lambda: paper(replace(decoder.llama3_8b(), max_length=8192), 3e-4, 512, 8),
}


def debug() -> Config:
    """Return two steps of a tiny model on the documentation of three small packages."""
    model = replace(decoder.tiny(), vocab_size=320)
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    data = documents.Config(only=("json", "wsgiref", "email"))
    return Config(model=model, fit=fit, learning_rate=1e-3, data=data, batch_size=8)


CONFIGS["debug"] = debug


def run(cfg: Config, workdir: Path) -> dict[str, float]:
    """Pretrain, evaluate on the full validation split, and return the metrics, also written to results.json."""
    mesh = stage.open_mesh(cfg)
    text = corpus.prepare(
        cfg.data, cfg.data_dir or workdir / "data", vocab_size=cfg.model.vocab_size, splits=("train", "validation")
    )
    text.tokenizer.save(workdir / "tokenizer")
    train = text.blocks("train", cfg.model.max_length, apart=cfg.apart)
    batches = stage.batches(cfg, train)
    validation = text.blocks("validation", cfg.model.max_length, apart=cfg.apart)

    model, key = decoder.Decoder(cfg.model), jax.random.key(cfg.seed)
    loss = next_token(model.apply, z_loss=cfg.z_loss, chunk=cfg.chunk)
    evaluate = runner.make_eval_step(loss)

    inputs = (np.zeros((cfg.batch_size, cfg.model.max_length), np.int32),)

    def make_params() -> tuple[Params, Params]:
        return state.init_params(model, inputs, key, mesh), {}

    rates = stage.rates(
        cfg,
        cfg.schedule,
        decay_steps=cfg.fit.num_steps // 5 if cfg.schedule == "wsd" else 0,
        final_ratio=0.0 if cfg.schedule in ("rsqrt", "constant") else 0.1,
    )

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        params = now.params if now.ema is None else now.ema
        sums = runner.totals(evaluate, params, stage.one_pass(cfg, validation, mesh))
        nll, tokens = sums["nll"]
        return {
            "nll": nll / tokens,
            "perplexity": metrics.perplexity(nll, tokens),
            "bits_per_byte": metrics.bits_per_byte(nll, text.num_bytes("validation")),
            "accuracy": sums["accuracy"][0] / tokens,
        }

    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, rates, make_params, ema_decay=cfg.ema_decay),
        make_params=make_params,
        batches=batches,
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg)},
        layout=state.layout(model, inputs, mesh),
        validate=validate,
        metric="nll",
        work=_work(cfg, jax.eval_shape(make_params)[0]),
    )
    with jax.set_mesh(mesh):
        measured = validate(cfg.fit.num_steps, done)
    results.write(workdir / "results.json", measured)
    return measured


def _work(cfg: Config, params: Params) -> loop.Work:
    """Return tokens and FLOPs per step: 6 N + 12 L H K T FLOPs per token (PaLM, appendix B; attention not halved)."""
    heads, tokens = cfg.model.attention, cfg.batch_size * cfg.model.max_length
    flops = profile.decoder_flops_per_token(
        profile.multiplied_params(params), cfg.model.num_layers, heads.num_heads * heads.head_dim, cfg.model.max_length
    )
    return loop.Work(tokens, "tokens", flops * tokens, profile.total_peak_flops(jax.devices(), cfg.model.dtype))


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=stage.RESUMABLE)
