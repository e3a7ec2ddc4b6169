"""Pretraining that goes on from a public model: its parameters, its tokenizer, its form, and no other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.language import bert_pretrain, lm_pretrain, t5_pretrain
from fm_jax.checkpoint.store import load_params
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text import documents, tokenizer
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.generation import Generation
from fm_jax.models.language import decoder, encoder, encoder_decoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.tasks.init import Init
from fm_jax.train import loop
from tests.close import close

SENTENCES = [f"The cat number {n} sat on the mat, and {n * n} dogs saw it run over to the barn." for n in range(60)]
# more rows than tokens, and a longer context than is trained on
SHAPE = replace(decoder.llama(2, 32, 4, 2, 48, vocab_size=288), max_length=64, init_std=0.1)
ENDS = Generation({"eos_token_id": [0, 5]}, {"eos_token_id": [0, 5], "temperature": 0.6})


def drawn(module: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), families.abstract(module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("models") / "llama", decoder.Decoder(SHAPE)
    pretrained.save(path, model, drawn(model), tokenizer.train(SENTENCES, 280), generation=ENDS)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for split, part in {"train": SENTENCES[:40], "validation": SENTENCES[40:]}.items():
        (path / split).mkdir()
        for number, half in enumerate((part[::2], part[1::2])):
            (path / split / f"{number}.txt").write_text("\n".join(half))
    return path


def config(folder: Path, texts: Path, **changed: Any) -> lm_pretrain.Config:
    data = documents.Config(kind="text", path=texts)
    model = replace(decoder.tiny(), max_length=16)  # of its other sizes none counts
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    options: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 8} | changed
    return lm_pretrain.Config(model=model, init=Init(folder), data=data, fit=fit, **options)


def nll(folder: Path, texts: Path) -> float:
    """Return the mean loss of the folder's model on the validation text, block by block, in float64."""
    found = pretrained.load(folder)
    assert found.tokenizer is not None
    end = found.tokenizer.end_id
    pieces = [found.tokenizer.encode((texts / "validation" / f"{number}.txt").read_text()) for number in range(2)]
    ids = np.array([end, *pieces[0], end, *pieces[1], end])
    apply, total = jax.jit(found.module.apply), 0.0
    for start in range(0, len(ids) - 1, 16):
        row = ids[start : start + 17]
        logits = np.asarray(apply({"params": found.params}, np.pad(row[:-1], (0, 17 - len(row)))[None]), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= logprobs[np.arange(len(row) - 1), row[1:]].sum()  # padding on the right is not attended to
    return total / (len(ids) - 1)


@pytest.mark.slow
def test_the_first_step_starts_from_the_folders_own_parameters(folder: Path, texts: Path, tmp_path: Path) -> None:
    cfg = config(folder, texts, learning_rate=0.0, export=tmp_path / "out")
    measured = lm_pretrain.run(cfg, tmp_path / "run")
    close(measured["before_nll"], nll(folder, texts), 1e-6)
    assert measured["nll"] == measured["before_nll"]  # nothing was learnt at rate 0
    given, out = pretrained.load(folder), pretrained.load(tmp_path / "out")
    assert given.tokenizer is not None and out.tokenizer is not None
    for params in (load_params(tmp_path / "run" / "checkpoints", "last"), out.params):
        jax.tree.map(np.testing.assert_array_equal, given.params, params)
    assert given.generation is not None and given.generation.end_ids == ENDS.end_ids
    assert out.generation == given.generation and out.tokenizer.fingerprint == given.tokenizer.fingerprint
    assert out.module.cfg == given.module.cfg and (given.module.cfg.max_length, given.module.cfg.vocab_size) == (
        64,
        288,
    )
    (corpus,) = (tmp_path / "run" / "data" / "corpora").iterdir()
    assert given.tokenizer.fingerprint in corpus.name


@pytest.mark.slow
def test_a_resumed_run_reads_no_weights_again(
    folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(folder, texts)
    first = lm_pretrain.run(cfg, tmp_path)
    assert first["nll"] < first["before_nll"]
    before = load_params(tmp_path / "checkpoints", "last")
    shutil.rmtree(tmp_path / "checkpoints" / "2")

    def refuse(*_: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(table, "read", refuse)
    assert lm_pretrain.run(cfg, tmp_path) == first
    jax.tree.map(np.testing.assert_array_equal, before, load_params(tmp_path / "checkpoints", "last"))
    assert json.loads((tmp_path / "results.json").read_text())["before_nll"] == first["before_nll"]


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True])
def test_an_encoder_goes_on_with_the_heads_that_it_has(pairs: bool, texts: Path, tmp_path: Path) -> None:
    bert = MaskedLM(encoder.Encoder(replace(encoder.tiny(), vocab_size=130)))
    params = drawn(bert)
    pretrained.save(tmp_path / "bert", bert, params, tokenizer.train_wordpiece(SENTENCES, 100))
    cfg = replace(
        bert_pretrain.debug(), init=Init(tmp_path / "bert"), data=documents.Config(kind="text", path=texts),
        fit=loop.FitConfig(1), learning_rate=0.0, next_sentence=pairs, short_share=0.0,
    )  # fmt: skip
    bert_pretrain.run(cfg, tmp_path / "run")
    trained = load_params(tmp_path / "run" / "checkpoints", "last")
    assert ("next" in trained) == pairs
    jax.tree.map(np.testing.assert_array_equal, params, {name: trained[name] for name in params})


@pytest.mark.slow
def test_an_encoder_decoder_goes_on_with_its_own_sentinels(texts: Path, tmp_path: Path) -> None:
    t5 = encoder_decoder.EncoderDecoder(replace(encoder_decoder.tiny(), vocab_size=320))
    params, words = drawn(t5), tokenizer.train(SENTENCES, 300, sentinels=12)
    pretrained.save(tmp_path / "t5", t5, params, words)
    data = documents.Config(kind="text", path=texts)
    cfg = replace(t5_pretrain.debug(), init=Init(tmp_path / "t5"), data=data, learning_rate=0.0)
    t5_pretrain.run(cfg, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path / "run" / "checkpoints", "last"))
    assert tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint == words.fingerprint


def test_what_does_not_fit_is_refused_before_anything_is_trained(folder: Path, texts: Path, tmp_path: Path) -> None:
    cfg = config(folder, texts)
    with pytest.raises(ConfigError, match=r"max_length 65 exceeds the 64 positions of .*llama; set at most 64"):
        lm_pretrain.run(replace(cfg, model=replace(cfg.model, max_length=65)), tmp_path / "long")
    bert = MaskedLM(encoder.Encoder(replace(encoder.tiny(), vocab_size=288)))
    pretrained.save(tmp_path / "bert", bert, drawn(bert), tokenizer.train_wordpiece(SENTENCES, 100))
    with pytest.raises(ConfigError, match=r"bert is of class MaskedLM; this pretraining needs Decoder"):
        lm_pretrain.run(config(tmp_path / "bert", texts), tmp_path / "encoder")
    tokenizer.train(SENTENCES, 270).save(tmp_path / "tokens")
    foreign = documents.Config(kind="tokens", path=tmp_path / "tokens")
    with pytest.raises(DataError, match="tokens of another tokenizer than the model's"):
        lm_pretrain.run(replace(cfg, data=foreign), tmp_path / "foreign")
    assert not list(tmp_path.glob("*/checkpoints"))
