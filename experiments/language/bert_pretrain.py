"""BERT pretraining on any corpus: masked language modelling and next-sentence prediction.

Papers: Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa: new masks at every epoch, full sentences without pairs).
Idea: the encoder reads a text in both directions. 15 % of the tokens are masked, and the model predicts them from their
context. Every later task starts from this encoder. Masks and pairs are drawn again at every epoch. `--whole_word true`
masks all pieces of a word together; `--next_sentence false` reads full sentences without pairs.

    ./launch.sh local experiments.language.bert_pretrain --config demo      # Python's own documentation, on any machine
    ./launch.sh local experiments.language.bert_pretrain --data.kind tfds --data.name wiki40b/en
    ./launch.sh local experiments.language.bert_pretrain --config roberta --data.kind jsonl --data.path corpus/
    ./launch.sh local experiments.language.bert_pretrain --init.from models/bert --data.kind text --data.path corpus/

`--init.from` continues the pretraining of an encoder: the work directory of an earlier run, a checkpoint folder, or
OWNER/NAME. Its form and its tokenizer are used; of `model`, only max_length, dropout, dtype and remat count. A head
that it lacks is randomly initialised.
`experiments.language.text_classify --init.from WORKDIR` finetunes the result, and so does `bert_squad`.
Presets: `default` (BERT base), `bert_large`, `roberta` (RoBERTa's objective on BERT base), `demo`, `debug`.
Hardware: `demo` needs two cores. BERT base needs one 80 GB GPU for days (`--accumulate`), or a pod.
Expected with `demo`, on the validation split: masked-token accuracy 14.4 % (most frequent token: 5.0 %), perplexity 269
(unigram: 556) and next-sentence accuracy 69 % (chance: 50 %), after 447 CPU-seconds (14 minutes on two cores shared
with other programs). The paper-scale presets were not run here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from fm_jax import cli
from fm_jax.checkpoint import surgery
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, Params, backbone
from fm_jax.data.packages import cache
from fm_jax.data.stream import loader
from fm_jax.data.stream.phases import Phases
from fm_jax.data.text import corpus, documents
from fm_jax.data.text.corpus import Corpus
from fm_jax.data.text.sentence_pairs import FullSentences, SentencePairs
from fm_jax.evals import metrics, runner
from fm_jax.evals.baselines import unigram
from fm_jax.evals.report import report, results
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language import encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.objectives.masked_lm import Choose, masked_lm, masking
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks import language
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import log, loop, stage, state


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    model: encoder.Config  # with init.from, only max_length, dropout, dtype and remat are used
    init: Init = Init()
    scratch: bool = False  # of the model in init.from, use only form and tokenizer: what are its weights worth?
    data: documents.Config = documents.Config()
    next_sentence: bool = True  # train on pairs and predict whether the second follows; false: full sentences
    whole_word: bool = False  # mask all pieces of a word together
    mask_rate: float = 0.15
    short_length: int = 128  # tokens per row in the first steps; `model.max_length` after that
    short_share: float = 0.9  # share of the steps with short rows
    warmup: float = 0.01  # share of the steps; then linear decay to 0
    optimizer: optimizers.Config = optimizers.Config(eps=1e-6)
    batch_size: int = 256  # rows per step, over all devices

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        super().__post_init__()
        if not 0 <= self.short_share < 1:
            raise ConfigError(f"short_share must be at least 0 and below 1, not {self.short_share}")
        if self.short_share and not 5 <= self.short_length <= self.model.max_length:
            raise ConfigError(f"short_length {self.short_length} must be within 5 and {self.model.max_length}")
        if self.scratch and self.init.from_ is None:
            raise ConfigError(
                "scratch needs a model whose form and tokenizer are used; set init.from, or scratch false"
            )
        if self.next_sentence and self.model.num_types < 2:
            raise ConfigError(
                "next_sentence needs a model with 2 token types; set model.num_types 2 or next_sentence false"
            )


def config() -> Config:
    """Return BERT base: a million steps of 256 rows, AdamW (0.9, 0.999, 1e-6) at 1e-4, decay 0.01, clip 1.

    Devlin et al. 2019, appendix A.2; epsilon and clipping follow optimization.py of google-research/bert.
    """
    model = replace(encoder.bert_base(), dtype="bfloat16", remat="dots")
    fit = loop.FitConfig(1_000_000, log_every=100, eval_every=10_000, save_every=5_000)
    return Config(model=model, fit=fit, learning_rate=1e-4)


def bert_large() -> Config:
    """Return BERT large with the same recipe."""
    return replace(config(), model=replace(encoder.bert_large(), dtype="bfloat16", remat="dots"), accumulate=4)


def roberta() -> Config:
    """Return RoBERTa's objective and batch size with BERT base's model and WordPieces (Liu et al. 2019, table 9)."""
    fit = loop.FitConfig(500_000, log_every=100, eval_every=10_000, save_every=5_000)
    adam = optimizers.Config(b1=0.9, b2=0.98, eps=1e-6, clip_norm=None)
    changed = {"next_sentence": False, "short_share": 0.0, "warmup": 24_000 / 500_000, "batch_size": 8_192}
    return replace(config(), fit=fit, learning_rate=6e-4, optimizer=adam, accumulate=32, **changed)  # type: ignore[arg-type]


def demo() -> Config:
    """Return the preset for two cores and eight minutes, on Python's documentation."""
    model = replace(encoder.bert(3, 128, 4, vocab_size=4096, dropout=0.0), max_length=64, init_std=0.0)
    return Config(
        model=model,
        fit=loop.FitConfig(1_500, log_every=20, eval_every=300, save_every=500),
        learning_rate=1e-2,
        short_share=0.0,
        warmup=0.05,
        optimizer=optimizers.Config(name="muon"),
        batch_size=32,
    )


def passages() -> Config:
    """Return a hundred steps of MiniLM on Wikipedia: the fetched sets minilm and boolq."""
    return Config(
        model=replace(encoder.bert(6, 384, 12, dropout=0.0), max_length=128),
        init=Init(cache.place("minilm")),
        data=documents.Config("jsonl", path=cache.place("boolq") / "passages"),
        fit=loop.FitConfig(100, log_every=10, eval_every=50),
        learning_rate=1e-3,
        next_sentence=False,
        short_share=0.0,
        warmup=0.1,
        batch_size=16,
    )


def debug() -> Config:
    """Return two steps of a tiny model, one with each row length, on the documentation of three packages."""
    model = replace(encoder.tiny(), vocab_size=400)
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    data = documents.Config(only=("json", "wsgiref", "email"))
    small = {"short_length": 16, "short_share": 0.5, "batch_size": 8}
    return Config(model=model, fit=fit, learning_rate=1e-3, data=data, **small)  # type: ignore[arg-type]


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "bert_large": bert_large,
    "roberta": roberta,
    "demo": demo,
    "passages": passages,
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, float]:
    """Pretrain, evaluate on the full validation split, and return the metrics, also written to results.json."""
    mesh, resumed = stage.open_mesh(cfg), resumes(workdir)
    earlier = language.continued(cfg.init, MaskedLM, encoder.Encoder, mesh=mesh, resumed=resumed)
    shape = shape_of(cfg, earlier)
    text = corpus.prepare(
        cfg.data,
        cfg.data_dir or workdir / "data",
        vocab_size=shape.vocab_size,
        splits=("train", "validation"),
        scheme="wordpiece",
        by_sentence=True,
        given=earlier.tokenizer if earlier else None,
    )
    text.tokenizer.save(workdir / "tokenizer")

    def stream(length: int) -> loader.Batches:
        return stage.batches(cfg, rows(cfg, text, "train", length))

    short = round(cfg.short_share * cfg.fit.num_steps)
    full = stream(cfg.model.max_length)
    batches = Phases((stream(cfg.short_length), full), (0, short)) if short else full
    validation = rows(cfg, text, "validation", cfg.model.max_length)

    model, key = MaskedLM(encoder.Encoder(shape), next_sentence=cfg.next_sentence), jax.random.key(cfg.seed)
    tokenizer = text.tokenizer
    special = (tokenizer.special("cls"), tokenizer.special("sep"), tokenizer.pad_id)
    choose = masking(
        tokenizer.special("mask"), tokenizer.vocab_size, special, rate=cfg.mask_rate, whole_word=cfg.whole_word
    )
    loss = masked_lm(model.apply, choose)
    evaluate = runner.make_eval_step(loss)

    inputs = (np.zeros((cfg.batch_size, cfg.model.max_length), np.int32),)

    def make_params() -> tuple[Params, Params]:
        params = state.init_params(model, inputs, key, mesh)
        return (params if earlier is None or resumed or cfg.scratch else loaded(params, earlier)), {}

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        sums = runner.totals(evaluate, now.params, stage.one_pass(cfg, validation, mesh))
        nll, count = sums["nll"]
        measured = {
            "nll": nll / count,
            "perplexity": metrics.perplexity(nll, count),
            "accuracy": sums["accuracy"][0] / count,
        }
        if cfg.next_sentence:
            pairs = sums["next_accuracy"][1]
            measured |= {"next_nll": sums["next_nll"][0] / pairs, "next_accuracy": sums["next_accuracy"][0] / pairs}
        return measured

    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, stage.rates(cfg, "linear"), make_params),
        make_params=make_params,
        batches=batches,
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg), **language.inherited(earlier)},
        files=language.kept(text.tokenizer),
        layout=state.layout(model, inputs, mesh),
        validate=validate,
        metric="nll",
        work=loop.Work(cfg.batch_size, "rows"),
    )
    with jax.set_mesh(mesh):
        measured = validate(cfg.fit.num_steps, done)
        measured |= baseline(text, choose, stage.one_pass(cfg, validation, mesh))
    results.write(workdir / "results.json", measured)
    if jax.process_index() == 0:
        report.loss_curves(
            workdir / "loss.png",
            log.curves(workdir / "metrics.jsonl", {"training": "train/nll", "validation": "validation/nll"}),
            title="Masked language modelling",
            ylabel="nats per masked token",
            lines={"unigram": float(np.log(measured["unigram_perplexity"]))},
        )
    return measured


def shape_of(cfg: Config, earlier: Pretrained | None) -> encoder.Config:
    """Return the config of the trained encoder: `cfg.model`, or the form of the model that it starts from."""
    if earlier is None:
        return cfg.model
    own: encoder.Config = backbone(earlier.module).cfg
    language.check_context(cfg.init, cfg.model.max_length, own.max_length)
    if cfg.next_sentence and own.num_types < 2:
        raise ConfigError(f"{cfg.init.from_} has no token types to tell two sentences apart; set next_sentence false")
    trained: encoder.Config = language.trained_form(own, cfg.model)
    return trained


def loaded(fresh: Params, earlier: Pretrained) -> Params:
    """Return the parameters of the earlier model; the heads that it lacks are those of `fresh`."""
    given = earlier.params if isinstance(earlier.module, MaskedLM) else {"backbone": earlier.backbone()[1]}
    given = {name: node for name, node in given.items() if name in fresh}
    if new := sorted(fresh.keys() - given.keys()):
        print(f"randomly initialised, because the model has none: {', '.join(new)}")
    return surgery.load(fresh, given, fresh=[f"{name}/.*" for name in new])


def rows(cfg: Config, text: Corpus, split: str, length: int) -> SentencePairs | FullSentences:
    """Return the rows of one split: sentence pairs or full sentences."""
    make = SentencePairs if cfg.next_sentence else FullSentences
    return make(text.tokens(split), text.tokenizer, length, name=f"{split} of {text.folder.name}")


def baseline(text: Corpus, choose: Choose, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the metrics of the unigram baseline (training frequencies) on the same masked tokens."""
    stream = text.tokens("train")
    pieces = (stream[start : start + (1 << 20)] for start in range(0, len(stream), 1 << 20))
    log_frequencies = unigram.count((piece[piece != stream.index.end_id] for piece in pieces), stream.vocab_size)

    def masked_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
        masked = choose(jax.random.key(0), batch)
        return masked.targets, masked.weights

    return unigram.measure(log_frequencies, masked_tokens, batches)


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=stage.RESUMABLE)
