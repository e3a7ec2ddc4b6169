"""Translation with an encoder-decoder: train it from scratch or from a pretrained T5, and measure BLEU.

Paper: Raffel et al. 2020 (T5). Idea: translation is a text-to-text task. The encoder reads the source, with the task's
name as a prefix, and the decoder writes the target. Training uses teacher forcing and cross-entropy; evaluation uses
greedy decoding and beam search.

    python -m experiments.language.t5_translate --config demo   # a generated English–German world, on two cores
    python -m experiments.language.t5_translate --config help_en_de   # real text, after experiments.fetch
    python -m experiments.language.t5_translate --config demo --init.from runs/t5_pretrain
    python -m experiments.language.t5_translate --init.from google-t5/t5-base --prefix "translate English to German: " …

`--init.from` is the work directory of a `t5_pretrain` run, a checkpoint folder, or OWNER/NAME. Without it the model is
randomly initialised and its tokenizer is trained on the training pairs. `--data.path` is a folder of aligned files
(train.en, train.de, validation.en, …) or of rows with a source and a target each (JSON lines, CSV, TSV or Parquet, see
`fm_jax/README.md`). Without it sentences are generated (`fm_jax/worlds/language/translation.py`); no test sentence
occurs in training.

The results are sacrebleu's BLEU and chrF with their signatures, and exact matches, for greedy decoding and beam search.
Two baselines are measured with them: copying the source, and a word-by-word dictionary (IBM model 1).

Measured with `--config demo` (1.1 M parameters, 3,000 steps of 64 pairs) on 1,000 sentences that do not occur in
training. The BLEU signature is nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0.

    test split       BLEU   chrF   exact matches
    copied source    0.03   13.2   0.000
    dictionary      16.70   64.3   0.031
    greedy          99.97  100.0   0.999
    beams of 4      99.97  100.0   0.999

The one error is a missing object. Greedy validation BLEU is 39 after 300 steps, 74 after 600, 91 after 900 and 95 after
1,200. The run took 16 CPU-minutes (11.5 minutes on two cores shared with other programs).

Measured with `--config help_en_de` (1.3 M parameters, 8,800 steps of 16 pairs: 5.7 epochs) on the 984 sentences of
other files of LibreOffice's help; 19 % of them are longer than the model reads or writes, and 7 also occur in training.

    test split       BLEU   chrF   exact matches
    copied source    3.70   20.6   0.000
    dictionary      11.14   52.5   0.002
    greedy          13.33   38.0   0.011
    beams of 4      13.55   37.2   0.013

So half an hour from scratch learns German sentences, but it loses much of what they should say: the dictionary has far
more of the right letters. One run; 30 CPU-minutes on cores shared with other programs.
Hardware: `demo` and `help_en_de` need two cores. The paper's finetuning needs one 80 GB GPU for days (`--accumulate`),
or a pod's host.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fm_jax import cli
from fm_jax.core import tree
from fm_jax.core.config import check_least, to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.data.packages import cache
from fm_jax.data.text import parallel, tokenizer
from fm_jax.data.text.parallel import Parallel
from fm_jax.evals import runner
from fm_jax.evals.report import report, results
from fm_jax.evals.scores import translation as scores
from fm_jax.generate import beam
from fm_jax.generate.translate import translate
from fm_jax.models.language import encoder_decoder
from fm_jax.objectives.seq2seq import seq2seq
from fm_jax.ops.positions import Buckets
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import language
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import log, loop, stage, state
from fm_jax.worlds.language import translation as world


@dataclass(frozen=True)
class Data:
    """The sentences' source. Counts, largest numeral and seed are settings of generated sentences."""

    path: Path | None = None  # folder of sentence pairs; none: generated sentences
    fields: tuple[str, str] = ("source", "target")  # field names in JSON lines
    languages: tuple[str, str] = ("en", "de")  # suffixes of the aligned files
    train: int = 100_000
    validation: int = 500
    test: int = 1_000
    largest: int = 9_999
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        check_least(self, train=1, validation=1, test=1, largest=2, seed=0)


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    model: encoder_decoder.Config  # with init.from, only dtype, remat and dropout are used
    data: Data = Data()
    init: Init = Init()
    prefix: str = ""  # text before every source
    source_length: int = 512  # in tokens, with the end token
    target_length: int = 512
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "constant"
    batch_size: int = 128  # pairs per step, over all devices
    label_smoothing: float = 0.0
    beams: beam.Config = beam.Config(4, length_penalty=0.6)
    tokenize: str = "13a"  # sacrebleu's tokenizer for BLEU
    watched: int = 200  # validation sentences to translate at every evaluation
    decode_batch: int = 64  # sentences per decoding batch

    def __post_init__(self) -> None:
        """Refuse an option that has no effect here."""
        super().__post_init__()
        check_least(self, source_length=1, target_length=1, watched=1, decode_batch=1)
        if self.data_dir is not None:
            raise ConfigError("data_dir must be none: sentences are read from data.path or generated at each start")


def config() -> Config:
    """Return the paper's finetuning of T5-base: 2^18 steps of 128 pairs, Adafactor at a constant 1e-3, dropout 0.1.

    Raffel et al. 2020, sections 3.1.2 and 3.7. For English to German they report 30.9 BLEU on newstest2014 (T5-base,
    beam size 4, length penalty 0.6; table 14), and 26.98 on the validation set (baseline of the ablations, greedy;
    table 1). Their BLEU is sacrebleu's with `--tokenize intl`. Not run here.
    """
    model = replace(encoder_decoder.with_dropout(encoder_decoder.t5_base(), 0.1), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(2**18, log_every=100, eval_every=5_000, save_every=5_000)
    rule = optimizers.Config(name="adafactor", clip_norm=None)
    return Config(model=model, fit=fit, learning_rate=1e-3, optimizer=rule, tokenize="intl")


def demo() -> Config:
    """Return the preset for two cores and a quarter of an hour, on generated sentences."""
    model = encoder_decoder.t5(2, 128, 4, 512, 32, vocab_size=1536)
    return Config(
        model=replace(model, max_length=25, buckets=Buckets(32, 32)),
        fit=loop.FitConfig(3_000, log_every=20, eval_every=300, save_every=300),
        learning_rate=4e-3,  # after 200 steps BLEU is 29 at 2.5e-3 and at 5e-3, 23 at 1e-2, 8 at 2e-2
        source_length=24,
        target_length=24,
        schedule="linear",
        warmup=0.03,
        optimizer=optimizers.Config(name="muon"),
        batch_size=64,
    )


def help_en_de() -> Config:
    """Return the preset for two cores and half a CPU-hour, on real text: 24,903 pairs of LibreOffice's help."""
    model = encoder_decoder.t5(2, 128, 4, 512, 32, vocab_size=3072)
    return Config(
        model=replace(model, buckets=Buckets(32, 64)),
        # as many pairs in 2,200 steps of 64, at 4e-3 with dropout 0.1, gave 7.5 BLEU; these give 13.3
        fit=loop.FitConfig(8_800, log_every=100, eval_every=800, save_every=800),
        learning_rate=2e-3,
        data=Data(cache.place("help_en_de")),
        source_length=40,
        target_length=48,
        schedule="linear",
        warmup=0.03,
        optimizer=optimizers.Config(name="muon"),
        batch_size=16,
        watched=100,
    )


def debug() -> Config:
    """Return two steps of a tiny model on a few sentences."""
    model = replace(encoder_decoder.tiny(), vocab_size=400)
    fit = loop.FitConfig(2, log_every=1, eval_every=1, save_every=1)
    data = Data(train=120, validation=8, test=12, largest=99)
    lengths = {"source_length": 40, "target_length": 40, "watched": 4, "decode_batch": 8, "batch_size": 8}
    beams = beam.Config(2, length_penalty=0.6)
    return Config(model=model, fit=fit, learning_rate=1e-3, data=data, beams=beams, **lengths)  # type: ignore[arg-type]


class Splits(NamedTuple):
    """Parallel text, and the linguistic phenomena of each test sentence if they are known."""

    train: Parallel
    validation: Parallel
    test: Parallel
    labels: list[tuple[str, ...]]  # phenomena of each test sentence; [] for a folder


def load(cfg: Data) -> Splits:
    """Open the three splits of a folder, or generate them."""
    if cfg.path is not None:
        options: dict[str, Any] = {"fields": cfg.fields, "languages": cfg.languages}
        train, validation, test = (
            parallel.load(cfg.path, split, **options) for split in ("train", "validation", "test")
        )
        return Splits(train, validation, test.head(len(test)), [])
    splits, drawn = {}, []
    counts: dict[world.Split, int] = {"train": cfg.train, "validation": cfg.validation, "test": cfg.test}
    for split, count in counts.items():
        drawn = list(world.sentences(split, count, seed=cfg.seed, largest=cfg.largest))
        splits[split] = Parallel(
            [one.source for one in drawn], [one.target for one in drawn], f"generated {split} pairs"
        )
    return Splits(splits["train"], splits["validation"], splits["test"], [one.phenomena for one in drawn])


class Opened(NamedTuple):
    """A model with its tokenizer, and its parameters if it is pretrained."""

    module: encoder_decoder.EncoderDecoder
    tokenizer: tokenizer.Tokenizer
    params: Params | None


def open_model(cfg: Config, train: Parallel, mesh: jax.sharding.Mesh, *, resumed: bool = False) -> Opened:
    """Open a pretrained model; without one, train a tokenizer for a randomly initialised model."""
    room = cfg.target_length + 1
    if cfg.init.from_ is None:
        some = train.head(50_000)
        texts = (side[row] for side in (some.sources, some.targets) for row in range(len(some)))
        # one sentinel: T5's layout, with the padding token 0 and </s> 1
        learnt = tokenizer.train(texts, cfg.model.vocab_size, sentinels=1)
        return Opened(encoder_decoder.EncoderDecoder(replace(cfg.model, max_length=room)), learnt, None)
    pretrained = language.load(cfg.init.source, **cfg.init.options, mesh=mesh, shapes=resumed)
    if not isinstance(pretrained.module, encoder_decoder.EncoderDecoder) or pretrained.tokenizer is None:
        kind = type(pretrained.module).__name__
        raise ConfigError(f"{cfg.init.from_} is a {kind}, not an encoder-decoder; give a T5 or mT5")
    shape = encoder_decoder.with_dropout(pretrained.module.cfg, cfg.model.dropout)
    shape = replace(shape, dtype=cfg.model.dtype, remat=cfg.model.remat, max_length=room)
    weights = None if resumed else pretrained.params  # a resumed run has its own
    return Opened(encoder_decoder.EncoderDecoder(shape), pretrained.tokenizer, weights)


def rows(cfg: Config, pairs: Parallel, tokenizer: tokenizer.Tokenizer) -> parallel.Pairs:
    """Return the tokenized rows of one split."""
    lengths = {"source_length": cfg.source_length, "target_length": cfg.target_length}
    return parallel.Pairs(pairs, tokenizer, **lengths, prefix=cfg.prefix)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, translate the test split by greedy decoding and beam search, and write results and two pictures."""
    scores.require()
    if jax.process_count() > 1:
        raise ConfigError("translation runs in one process; start one process with all devices of its machine")
    mesh, key, started = stage.open_mesh(cfg), jax.random.key(cfg.seed), time.perf_counter()
    data = load(cfg.data)
    model, learnt_tokenizer, pretrained = open_model(cfg, data.train, mesh, resumed=resumes(workdir))
    learnt_tokenizer.save(workdir / "tokenizer")
    train, validation, test = (rows(cfg, pairs, learnt_tokenizer) for pairs in (data.train, data.validation, data.test))
    watched = data.validation.head(cfg.watched)

    loss = seq2seq(model.apply, label_smoothing=cfg.label_smoothing)
    evaluate = runner.make_eval_step(loss)
    answer = partial(
        translate,
        model,
        tokenizer=learnt_tokenizer,
        source_length=cfg.source_length,
        max_new_tokens=cfg.target_length,
        prefix=cfg.prefix,
        batch_size=cfg.decode_batch,
    )

    inputs = tuple(np.zeros((1, length), np.int32) for length in (cfg.target_length, cfg.source_length))
    layout = state.layout(model, inputs, mesh)

    def make_params() -> tuple[Params, Params]:
        if pretrained is not None:
            return jax.device_put(pretrained, jax.tree.map(lambda leaf: leaf.sharding, layout)), {}
        return state.init_params(model, inputs, key, mesh), {}

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        measured = runner.evaluate(evaluate, now.params, stage.one_pass(cfg, validation, mesh))
        measured |= scores.score(
            answer(now.params, texts=_texts(watched.sources)), _texts(watched.targets), tokenize=cfg.tokenize
        )
        return {name: measured[name] for name in ("nll", "accuracy", "bleu", "exact")}

    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, stage.rates(cfg, cfg.schedule), make_params),
        make_params=make_params,
        batches=stage.batches(cfg, train),
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg)},
        files=language.kept(learnt_tokenizer),
        layout=layout,
        validate=validate,
        work=loop.Work(cfg.batch_size * (cfg.source_length + cfg.target_length)),
    )
    with jax.set_mesh(mesh):
        sources = _texts(data.test.sources)
        written = {
            "greedy": answer(done.params, texts=sources),
            f"beams of {cfg.beams.num_beams}": answer(done.params, texts=sources, beams=cfg.beams),
        }
    measured = judge(cfg, data, written) | {
        "parameters": tree.count(done.params),
        "test_pairs_seen_in_training": seen(data.train, data.test),
        "test_pairs_cut": test.cut_share(len(test)),
        "seconds_this_start": time.perf_counter() - started,
    }
    results.write(workdir / "results.json", measured)
    draw(measured, workdir)
    return measured


def judge(cfg: Config, data: Splits, written: dict[str, list[str]]) -> dict[str, Any]:
    """Score the translations of the model and of the baselines on the test split; choose samples."""
    some = data.train.head(50_000)
    dictionary = scores.learn_dictionary(_texts(some.sources), _texts(some.targets))
    sources, references = _texts(data.test.sources), _texts(data.test.targets)
    baselines = {"copied source": sources, "dictionary": [dictionary.translate(text) for text in sources]}
    everything = baselines | written
    measured = {
        name: scores.score(texts, references, tokenize=cfg.tokenize) for name, texts in everything.items()
    }  # fmt: skip
    best = list(written)[-1]
    samples = [
        {"source": sources[row], "reference": references[row]} | {name: texts[row] for name, texts in written.items()}
        for row in _sampled(written[best], references)
    ]
    judged: dict[str, Any] = {"test": measured, "samples": samples}
    if data.labels:
        judged["exact_by_phenomenon"] = {
            name: scores.exact_by(everything[name], references, data.labels) for name in (best, "greedy", "dictionary")
        }
    return judged


def seen(train: Parallel, test: Parallel) -> int:
    """Count the test pairs whose source or target also occurs in training."""
    sources, targets = set(_texts(test.sources)), set(_texts(test.targets))
    known = {train.sources[row] for row in range(len(train)) if train.sources[row] in sources}
    written = {train.targets[row] for row in range(len(train)) if train.targets[row] in targets}
    return sum(
        source in known or target in written
        for source, target in zip(_texts(test.sources), _texts(test.targets), strict=True)
    )


def draw(measured: dict[str, Any], workdir: Path) -> None:
    """Write two pictures, and the tables in results.md; print the tables."""
    rows = [row for row in log.read(workdir / "metrics.jsonl") if "validation/bleu" in row]
    report.loss_curves(
        workdir / "bleu.png",
        {"greedy, validation": ([row["step"] for row in rows], [row["validation/bleu"] for row in rows])},
        title="Validation BLEU during training",
        ylabel="BLEU",
        lines={name: measured["test"][name]["bleu"] for name in ("copied source", "dictionary")},
    )
    columns = {"method": "test split", "bleu": "BLEU", "chrf": "chrF", "exact": "exact matches"}
    lines = [report.table([{"method": name} | figures for name, figures in measured["test"].items()], columns)]
    first = next(iter(measured["test"].values()))
    lines += [f"BLEU {first['bleu_signature']}; chrF {first['chrf_signature']}\n"]
    if by_method := measured.get("exact_by_phenomenon"):
        best = next(iter(by_method))
        bars = {name: by_method[name] for name in (best, "dictionary")}
        scores.phenomenon_bars(
            workdir / "phenomena.png", bars, title="Exact matches on unseen sentences, by phenomenon"
        )
        table = [
            {"phenomenon": name, "sentences": number} | {method: exact[name][0] for method, exact in by_method.items()}
            for name, (_, number) in by_method[best].items()
        ]
        lines += [report.table(table, list(table[0]))]
    lines += [report.table(measured["samples"], list(measured["samples"][0]))]
    (workdir / "results.md").write_text("\n".join(lines), "utf-8")
    print("\n".join(lines))


def _sampled(texts: Sequence[str], references: Sequence[str], count: int = 8) -> list[int]:
    """Return evenly spaced rows of the split and the first few wrong ones."""
    wrong = [row for row, (one, other) in enumerate(zip(texts, references, strict=True)) if one != other]
    spread = np.linspace(0, len(references) - 1, min(count, len(references))).astype(int).tolist()
    return list(dict.fromkeys([*spread, *wrong[: count // 2]]))


def _texts(side: parallel.Texts) -> list[str]:
    return [side[row] for row in range(len(side))]


if __name__ == "__main__":
    cli.main(
        run,
        {"default": config, "demo": demo, "help_en_de": help_en_de, "debug": debug},
        resumable=(*stage.RESUMABLE, "beams.*", "tokenize", "decode_batch"),
    )
