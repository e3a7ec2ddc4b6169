"""Question answering as a whole: what it starts from, what it writes, and that it learns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.language import bert_pretrain, bert_squad
from fm_jax.checkpoint.store import load_params
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.data.text import squad, tokenizer
from fm_jax.hub import pretrained
from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.span import SpanFinder
from fm_jax.optim import optimizer as optimizers
from fm_jax.tasks.init import Init
from fm_jax.train import loop
from fm_jax.worlds.language import people


def folder(path: Path, module: Any, *inputs: Any) -> Path:
    """Write a checkpoint as others do, with a tokenizer of the generated set's words."""
    world = people.generate(people.Config(train=24, validation=1, test=1), "train")
    texts = [paragraph["context"] for article in world["data"] for paragraph in article["paragraphs"]]
    params = module.init(jax.random.key(7), *inputs, mutable=["params"])["params"]
    from flax.core import meta

    pretrained.save(path, module, meta.unbox(params), tokenizer.train_wordpiece(texts, 420))
    return path


def backbone() -> encoder.Encoder:
    return encoder.Encoder(replace(encoder.tiny(), vocab_size=420, max_length=64))


def span_folder(path: Path) -> Path:
    return folder(path, SpanFinder(backbone()), np.zeros((1, 8), np.int32), np.ones(1, np.int32))


@pytest.mark.slow
def test_predictions_are_in_the_official_format_and_stand_in_their_contexts(tmp_path: Path) -> None:
    measured = bert_squad.run(bert_squad.debug(), tmp_path)
    predictions = json.loads((tmp_path / "predictions.json").read_text("utf-8"))
    questions = squad.read(tmp_path / "data" / "test.json")
    assert predictions.keys() == {question.id for question in questions}
    assert all(predictions[question.id] in question.context for question in questions)
    best = json.loads((tmp_path / "nbest.json").read_text("utf-8"))
    for question in questions:
        spans = best[question.id]
        assert 1 < len(spans) <= 20 and predictions[question.id] in ("", spans[0]["text"])
        assert all(question.context[span["start"] :].startswith(span["text"]) for span in spans)
        assert [span["score"] for span in spans] == sorted((span["score"] for span in spans), reverse=True)
    assert measured["threshold_chosen_on"] == "validation" and measured["predictions_of"] == "test"
    assert measured["test"]["first span of the type"]["type"]["exact"] == 1.0
    assert (tmp_path / "exact_match.png").exists() and "this model" in (tmp_path / "results.md").read_text("utf-8")


@pytest.mark.slow
def test_a_test_file_without_answers_is_answered_and_not_scored(tmp_path: Path) -> None:
    cfg = bert_squad.debug()
    people.write(tmp_path / "data", cfg.data.world)
    tree = json.loads((tmp_path / "data" / "test.json").read_text("utf-8"))
    for paragraph in (paragraph for article in tree["data"] for paragraph in article["paragraphs"]):
        for question in paragraph["qas"]:
            del question["answers"], question["is_impossible"]
    (tmp_path / "data" / "test.json").write_text(json.dumps(tree), "utf-8")
    measured = bert_squad.run(replace(cfg, data=replace(cfg.data, path=tmp_path / "data")), tmp_path / "run")
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text("utf-8"))
    assert predictions.keys() == {question.id for question in squad.read(tmp_path / "data" / "test.json")}
    assert "validation" in measured and "test" not in measured and measured["predictions_of"] == "test"


def test_a_public_checkpoint_keeps_its_trained_head_and_another_gets_a_fresh_one(tmp_path: Path) -> None:
    mesh, cfg = make_mesh(MeshConfig()), bert_squad.debug()
    whole = bert_squad.open_reader(replace(cfg, init=Init(span_folder(tmp_path / "qa"))), [], mesh)
    assert whole.given.keys() == {"backbone", "head"} and whole.inputs == ("tokens", "length", "types")
    bare = folder(tmp_path / "bert", backbone(), np.zeros((1, 8), np.int32))
    reader = bert_squad.open_reader(replace(cfg, init=Init(bare)), [], mesh)
    assert reader.given.keys() == {"backbone"}
    assert reader.tokenizer.vocab_size == 420


@pytest.mark.slow
def test_training_starts_from_what_is_given(tmp_path: Path) -> None:
    given = load_whole(span_folder(tmp_path / "qa"))
    still = replace(bert_squad.debug(), init=Init(tmp_path / "qa"), learning_rate=0.0)
    bert_squad.run(still, tmp_path / "run")
    found = load_params(tmp_path / "run" / "checkpoints", "last")
    jax.tree.map(np.testing.assert_array_equal, given, found)


def load_whole(path: Path) -> Any:
    return pretrained.load(path).params


@pytest.mark.slow
def test_a_pretraining_run_is_gone_on_from(tmp_path: Path) -> None:
    bert_pretrain.run(bert_pretrain.debug(), tmp_path / "pretrain")
    cfg = bert_squad.debug()
    rows = replace(cfg.data, window=squad.Cut(32, 5, 12))
    bert_squad.run(replace(cfg, init=Init(tmp_path / "pretrain"), data=rows, learning_rate=0.0), tmp_path / "run")
    before, after = (load_params(tmp_path / name / "checkpoints", "last") for name in ("pretrain", "run"))
    jax.tree.map(np.testing.assert_array_equal, before["backbone"], after["backbone"])


SHORT = encoder.Encoder(replace(encoder.tiny(), vocab_size=420, max_length=32))
CAUSAL = decoder.Decoder(replace(decoder.tiny(), vocab_size=420))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (CAUSAL, "is a Decoder; question answering needs an encoder"),
        (SHORT, "data.window.length 64 is more than the max_length 32 of"),
    ],
)
def test_a_checkpoint_that_cannot_read_the_rows_is_refused(module: Any, said: str, tmp_path: Path) -> None:
    cfg = replace(bert_squad.debug(), init=Init(folder(tmp_path / "public", module, np.zeros((1, 8), np.int32))))
    with pytest.raises(ConfigError, match=said):
        bert_squad.run(cfg, tmp_path / "run")


@pytest.mark.parametrize(("field", "value"), [("accumulate", 5), ("batch_size", 0), ("warmup", 1.0)])
def test_numbers_that_cannot_be_followed_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(bert_squad.debug(), **{field: value})


@pytest.mark.slow
def test_a_few_questions_are_learnt_by_heart(tmp_path: Path) -> None:
    folder = tmp_path / "squad"
    people.write(folder, people.Config(train=6, validation=1, test=1))
    (folder / "validation.json").write_bytes((folder / "train.json").read_bytes())  # what was learnt is asked
    (folder / "test.json").unlink()
    cfg = bert_squad.debug()
    learnt = replace(
        cfg,
        data=replace(cfg.data, path=folder),
        model=replace(cfg.model, vocab_size=220),
        optimizer=optimizers.Config(),
        learning_rate=5e-3,
        batch_size=16,
        fit=loop.FitConfig(507, log_every=100),  # 100 passes
    )
    measured = bert_squad.run(learnt, tmp_path / "run")
    assert measured["validation"]["this model"]["all"]["exact"] == 1.0
    assert "threshold" not in measured
