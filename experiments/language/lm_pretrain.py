r"""Language-model pretraining on any corpus: next-token prediction with a decoder, on a laptop or a cluster.

Papers: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3), Touvron et al. 2023 (LLaMA).
Idea: a decoder learns to predict the next token of unlabelled text; every later task starts from it. As for GPT-3,
documents are joined with an end-of-text token and split into blocks of the context length. With `--apart true`,
attention does not cross from one document to another.

    ./launch.sh local experiments.language.lm_pretrain                      # Python's own documentation, on any machine
    ./launch.sh local experiments.language.lm_pretrain --config passages    # Wikipedia, fetched: three minutes
    ./launch.sh local experiments.language.lm_pretrain --config gpt2_small --data.kind tfds --data.name wiki40b/en
    ./launch.sh local experiments.language.lm_pretrain --config gpt2_small --data.kind jsonl --data.path corpus/
    ./launch.sh local experiments.language.lm_pretrain --init.from models/SmolLM2 --data.kind text --data.path corpus/ \
        --learning_rate 1e-5 --export continued

`--init.from` continues the pretraining of a decoder: the work directory of an earlier run, a checkpoint folder, or
OWNER/NAME. Its form and its tokenizer are used; of `model`, only max_length (the training context), dropout, dtype and
remat count. The results then also have the metrics before the first step. `--export` writes a folder that
`transformers` opens.
    ./launch.sh local experiments.language.lm_pretrain --data.kind text --data.path input.txt

`--data.kind` has the kinds of files of `fm_jax/README.md`. A folder of ready-made tokens has its own tokenizer.
Presets: `default` (6 layers, width 512, 8 heads, vocabulary 10,000, Adam at 1e-3), `small` and `passages` (4 layers of
width 128, Muon; beside byte n-grams and xz), `gpt2_*`, `gpt3_*`, `llama2_*`, `llama3_8b`; and with a mesh for so many
TPUs, compiled by `--plan` (`experiments/README.md`): `gpt3_6_7b_v6e_256`, `llama3_8b_v5p_64`.
Hardware: the default runs anywhere. `gpt2_small` needs one 80 GB GPU (half a million tokens per step, with
`--accumulate`); `gpt3_6_7b` and larger need a pod (`--mesh.fsdp`, `--mesh.tensor`).
Expected: the quickstart's language model is trained by this module; its results are in `experiments/README.md`. The
paper-scale presets were not run here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fm_jax import cli
from fm_jax.checkpoint import surgery
from fm_jax.core import files
from fm_jax.core.config import check_least, to_dict
from fm_jax.core.errors import CheckpointError, ConfigError, DataError
from fm_jax.core.mesh import MeshConfig
from fm_jax.core.types import Params
from fm_jax.data.packages import cache
from fm_jax.data.text import corpus, documents
from fm_jax.evals import metrics, runner
from fm_jax.evals.baselines import ngram
from fm_jax.evals.report import report, results
from fm_jax.hub import families
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language import decoder
from fm_jax.objectives.language import next_token
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import language
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import loop, profile, stage, state

ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3, "fivegram": 5}
"""Byte n-grams that a language model is compared with."""


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    model: decoder.Config  # with init.from, only max_length, dropout, dtype and remat are used
    init: Init = Init()
    data: documents.Config = documents.Config()
    apart: bool = False  # no attention between the documents of a block
    schedule: Literal["cosine", "linear", "rsqrt", "wsd", "constant"] = "cosine"
    warmup: float = 0.01  # share of the steps
    batch_size: int = 512  # sequences of `model.max_length` per step, over all devices
    z_loss: float = 0.0  # weight of the squared log partition function
    chunk: int = 0  # tokens whose logits are in memory at once; 0: all
    ema_decay: float | None = None  # keep an EMA of the parameters and evaluate it; none: no EMA
    export: Path | None = None  # folder to write for transformers at the end; it must not exist yet
    baselines: bool = False  # also measure byte n-grams and xz, with the training text in memory

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        check_least(self, chunk=0)
        if self.baselines and self.data.kind == "tokens":
            raise ConfigError("baselines need texts, and data.kind tokens has none; set baselines false")


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


def pod(cfg: Config, chips: int, accumulate: int) -> Config:
    """Return a recipe for so many chips, which each hold one part of the parameters, the optimiser and the batch."""
    return replace(cfg, mesh=MeshConfig(data=1, fsdp=chips), accumulate=accumulate)


def config() -> Config:
    """Return a Transformer of 29 M parameters with Adam at 1e-3, sized for Python's documentation."""
    fit = loop.FitConfig(2000, eval_every=200, save_every=200)
    adam = optimizers.Config(name="adam")
    return Config(
        model=decoder.lm10k(), fit=fit, learning_rate=1e-3, optimizer=adam, schedule="constant", batch_size=16
    )


def small() -> Config:
    """Return a decoder of 1.1 M parameters (4 layers of width 128, context 128), for two cores and three minutes."""
    base = decoder.gpt(4, 128, 4, vocab_size=2048, max_length=128)
    # validation bits per byte after 300 steps: Muon 2.24, the better of two AdamW settings 2.73
    muon = optimizers.Config(name="muon")
    return Config(
        # rematerialisation saves memory traffic: a step takes 162 ms instead of 218 on two cores
        model=replace(base, init_std=0.0, remat="dots"),
        fit=loop.FitConfig(700, log_every=10, eval_every=175, save_every=175),
        learning_rate=1e-2,
        batch_size=16,
        schedule="linear",
        warmup=0.05,
        optimizer=muon,
        baselines=True,
    )


def passages() -> Config:
    """Return `small` on Wikipedia: the passages of the fetched set boolq."""
    return replace(small(), data=documents.Config("jsonl", path=cache.place("boolq") / "passages"))


# Batch sizes: half a million tokens for GPT-2, table 2.1 of the paper for GPT-3, four million tokens for LLaMA (LLaMA
# 2, table 1). Learning rates: GPT-3's table 2.1 (also for GPT-2's sizes), LLaMA 2's table 1, LLaMA 3's table 3.
CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "small": small,
    "passages": passages,
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
CONFIGS |= {
    "gpt3_6_7b_v6e_256": lambda: pod(CONFIGS["gpt3_6_7b"](), 256, 1),
    "llama3_8b_v5p_64": lambda: pod(CONFIGS["llama3_8b"](), 64, 8),
}


def debug() -> Config:
    """Return two steps of a tiny model on the documentation of three small packages."""
    model = replace(decoder.tiny(), vocab_size=320)
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    data = documents.Config(only=("json", "wsgiref", "email"))
    return Config(model=model, fit=fit, learning_rate=1e-3, data=data, batch_size=8)


CONFIGS["debug"] = debug


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Pretrain, evaluate on the full validation split, and return the metrics, also written to results.json."""
    if cfg.export:
        files.check_target(cfg.export, CheckpointError)
    mesh, resumed = stage.open_mesh(cfg), resumes(workdir)
    earlier = language.continued(cfg.init, decoder.Decoder, mesh=mesh, resumed=resumed)
    shape, length = shape_of(cfg, earlier), cfg.model.max_length
    model = decoder.Decoder(shape)
    if cfg.export:
        public.check_form(model, families.writing(model).fields(model))
    text = corpus.prepare(
        cfg.data,
        cfg.data_dir or workdir / "data",
        vocab_size=shape.vocab_size,
        splits=("train", "validation"),
        given=earlier.tokenizer if earlier else None,
    )
    text.tokenizer.save(workdir / "tokenizer")
    key = jax.random.key(cfg.seed)
    train, validation = (text.blocks(split, length, apart=cfg.apart) for split in ("train", "validation"))
    if (limit := train.limits["tokens"]) > shape.vocab_size:
        raise DataError(f"{train.name} has {limit} tokens, but the model's embedding has {shape.vocab_size} rows")
    batches = stage.batches(cfg, train)

    loss = next_token(model.apply, z_loss=cfg.z_loss, chunk=cfg.chunk)
    evaluate = runner.make_eval_step(loss)

    inputs = (np.zeros((cfg.batch_size, length), np.int32),)
    layout = state.layout(model, inputs, mesh)

    def make_params() -> tuple[Params, Params]:
        if earlier is not None and not resumed:
            return surgery.load(layout, earlier.params), {}
        return state.init_params(model, inputs, key, mesh), {}

    rates = stage.rates(
        cfg,
        cfg.schedule,
        decay_steps=cfg.fit.num_steps // 5 if cfg.schedule == "wsd" else 0,
        final_ratio=0.0 if cfg.schedule in ("rsqrt", "constant") else 0.1,
    )

    def measure(params: Params) -> dict[str, float]:
        sums = runner.totals(evaluate, params, stage.one_pass(cfg, validation, mesh))
        nll, tokens = sums["nll"]
        return {
            "nll": nll / tokens,
            "perplexity": metrics.perplexity(nll, tokens),
            "bits_per_byte": metrics.bits_per_byte(nll, text.num_bytes("validation")),
            "accuracy": sums["accuracy"][0] / tokens,
        }

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        return measure(now.params if now.ema is None else now.ema)

    if earlier is not None and not resumed:
        with jax.set_mesh(mesh):
            results.write(workdir / "before.json", measure(make_params()[0]))
    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, rates, make_params, ema_decay=cfg.ema_decay),
        make_params=make_params,
        batches=batches,
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg), **language.inherited(earlier)},
        files=language.kept(text.tokenizer),
        layout=layout,
        validate=validate,
        metric="nll",
        work=_work(cfg, shape, jax.eval_shape(make_params)[0]),
    )
    with jax.set_mesh(mesh):
        measured = validate(cfg.fit.num_steps, done)
    if (before := workdir / "before.json").is_file():
        measured |= {f"before_{name}": value for name, value in results.read(before).items()}
    everything: dict[str, Any] = dict(measured)
    if cfg.baselines and jax.process_index() == 0:
        bits = results.once(workdir / "baselines.json", lambda: baselines(cfg.data, cfg.data_dir or workdir / "data"))
        everything["baselines_bits_per_byte"] = bits
        print(show(bits, measured["bits_per_byte"], workdir / "bits_per_byte.png"))
    results.write(workdir / "results.json", everything)
    if cfg.export:
        params = jax.tree.map(runner.gather, done.params if done.ema is None else done.ema)  # every process takes part
        if jax.process_index() == 0:
            kept = earlier.generation if earlier else None
            public.save(cfg.export, model, params, text.tokenizer, generation=kept)
    return everything


def baselines(cfg: documents.Config, data_dir: Path) -> dict[str, float]:
    """Return bits per byte of smoothed byte n-grams and of xz on the validation split, given the training split."""
    text = {}
    for split in ("train", "validation"):
        texts = documents.documents(cfg, split, data_dir)
        text[split] = b"".join(texts[index].encode() for index in range(len(texts)))
    by_order = ngram.bits_per_byte_by_order(text["train"], text["validation"], tuple(ORDERS.values()))
    bits = {name: by_order[order] for name, order in ORDERS.items()}
    return bits | {"xz": ngram.xz_bits_per_byte(text["train"], text["validation"])}


def show(baselines: Mapping[str, float], model: float, png: Path) -> str:
    """Draw bits per byte of the baselines and of the model, best last; return them as a table."""
    bits = dict(sorted({**baselines, "this model": model}.items(), key=lambda item: -item[1]))
    title = "Validation bits per byte (lower is better)"
    report.bits_per_byte_bars(png, bits, highlight=("this model",), title=title)
    rows = [{"language model": name, "validation bits per byte": round(value, 3)} for name, value in bits.items()]
    return report.table(rows, list(rows[0]))


def shape_of(cfg: Config, earlier: Pretrained | None) -> decoder.Config:
    """Return the config of the trained model: `cfg.model`, or the form of the model that it starts from."""
    if earlier is None:
        return cfg.model
    own: decoder.Config = earlier.module.cfg
    language.check_context(cfg.init, cfg.model.max_length, own.max_length)
    trained: decoder.Config = language.trained_form(own, cfg.model)
    return trained


def _work(cfg: Config, shape: decoder.Config, params: Params) -> loop.Work:
    """Return tokens and FLOPs per step: 6 N + 12 L H K T FLOPs per token (PaLM, appendix B; attention not halved)."""
    heads, tokens = shape.attention, cfg.batch_size * cfg.model.max_length
    flops = profile.decoder_flops_per_token(
        profile.multiplied_params(params), shape.num_layers, heads.num_heads * heads.head_dim, cfg.model.max_length
    )
    return loop.Work(tokens, "tokens", flops * tokens, profile.total_peak_flops(jax.devices(), cfg.model.dtype))


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "export"))
