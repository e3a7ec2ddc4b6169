"""What the two pretraining experiments leave, and their options."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.language import bert_pretrain, t5_pretrain
from fm_jax.checkpoint.store import load_meta, load_params
from fm_jax.core.config import from_dict
from fm_jax.core.errors import ConfigError
from fm_jax.data.text import tokenizer
from fm_jax.models.language import encoder_decoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.tasks import language


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [True, False])
def test_a_masked_lm_opens_as_what_it_was_trained(pairs: bool, tmp_path: Path) -> None:
    cfg = replace(bert_pretrain.debug(), next_sentence=pairs, whole_word=not pairs)
    measured = bert_pretrain.run(cfg, tmp_path)
    assert ("next_accuracy" in measured) == pairs
    assert (tmp_path / "loss.png").stat().st_size > 1000
    found = language.load(tmp_path)
    assert isinstance(found.module, MaskedLM) and found.module.next_sentence == pairs
    assert found.tokenizer is not None and found.tokenizer.special("mask") == 4
    logits = found.module.apply({"params": found.params}, found.tokenizer.encode_pair("the name").ids[None])
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.slow
def test_an_encoder_decoder_keeps_its_shape_and_its_sentinels(tmp_path: Path) -> None:
    t5_pretrain.run(t5_pretrain.debug(), tmp_path)
    shape = from_dict(encoder_decoder.Config, load_meta(tmp_path / "checkpoints", "last")["config"]["model"])
    words = tokenizer.load(tmp_path / "tokenizer")
    assert words.sentinels == list(range(479, 379, -1)) and shape.vocab_size == words.vocab_size
    params = load_params(tmp_path / "checkpoints", "last")
    rows = np.zeros((1, 8), np.int32)
    assert np.isfinite(np.asarray(encoder_decoder.EncoderDecoder(shape).apply({"params": params}, rows, rows))).all()


def test_parts_that_do_not_fit_are_refused() -> None:
    cfg = bert_pretrain.debug()
    with pytest.raises(ConfigError, match="short_length 99 must be within 5 and 32"):
        replace(cfg, short_length=99)
    with pytest.raises(ConfigError, match="2 token types"):
        replace(cfg, model=replace(cfg.model, num_types=1))
    with pytest.raises(ConfigError, match="multiple of accumulate 3"):
        replace(cfg, accumulate=3)
    with pytest.raises(ConfigError, match="warmup is a share"):
        replace(t5_pretrain.debug(), warmup=1.0)


def test_the_papers_recipes_are_whole() -> None:
    for make in bert_pretrain.CONFIGS.values():
        make()
    for make in t5_pretrain.CONFIGS.values():
        make()
    cfg = t5_pretrain.config()
    assert (cfg.learning_rate, round(cfg.warmup * cfg.fit.num_steps)) == (0.01, 10_000)
    bert = bert_pretrain.config()
    adam = bert.optimizer
    assert [adam.value(name) for name in ("b1", "b2", "eps", "weight_decay")] == [0.9, 0.999, 1e-6, 0.01]
