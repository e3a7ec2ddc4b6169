"""Opening what earlier stages left, and making a classifier of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint.store import Store
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import families
from fm_jax.hub import pretrained as public
from fm_jax.hub.generation import Generation
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language import decoder, encoder, encoder_decoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.vision import resnet
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.tasks import language

TEXTS = ["the cat sat on the mat and the dog ran after it"] * 3
TINY = replace(decoder.tiny(), vocab_size=258)
BERT = Encoder(encoder.tiny())


def drawn(module: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), families.abstract(module))


def leave_run(workdir: Path, module: Any, params: Any, about: Any = None, **metrics: float) -> None:
    """Leave what a pretraining run leaves: two checkpoints, of which the first is the better one, and a tokenizer."""
    worse = jax.tree.map(lambda leaf: leaf + 1, params)
    meta = {"config": {}, "model": models.describe(module), **(about or {})}
    with Store(workdir / "checkpoints", metric="validation/nll", meta=meta) as store:
        store.save(1, {"params": params}, {}, dict(metrics))
        store.save(2, {"params": worse}, {}, {name: value + 1 for name, value in metrics.items()})
    tokenizers.train(TEXTS, 258).save(workdir / "tokenizer")


def same(one: Any, other: Any) -> bool:
    flat, rest = tree.flatten(one), tree.flatten(other)
    return flat.keys() == rest.keys() and all(np.array_equal(flat[path], rest[path]) for path in flat)


@pytest.mark.parametrize("judged", [True, False])
def test_a_decoders_run_gives_its_best_or_else_its_last_checkpoint(judged: bool, tmp_path: Path) -> None:
    params = drawn(Decoder(TINY))
    ends = Generation({"eos_token_id": [3, 4]}, {"top_k": 5})  # of the model that the run started from
    about = {"generation": ends.describe()} if judged else None
    leave_run(tmp_path, Decoder(TINY), params, about, **({"validation/nll": 2.0} if judged else {}))
    found = language.load(tmp_path)
    assert found.generation == (ends if judged else None)
    assert found.module == Decoder(TINY)
    assert found.tokenizer is not None and found.tokenizer.vocab_size == 258
    assert same(found.params, params) == judged
    assert language.load(tmp_path, dtype="bfloat16").module == Decoder(replace(TINY, dtype="bfloat16"))


@pytest.mark.parametrize("pairs", [True, False])
def test_an_encoders_run_gives_its_masked_language_model(pairs: bool, tmp_path: Path) -> None:
    module = MaskedLM(Encoder(replace(encoder.tiny(), vocab_size=258)), next_sentence=pairs)
    params = drawn(module)
    leave_run(tmp_path, module, params)
    found = language.load(tmp_path)
    assert found.module == module
    assert found.backbone()[0] == module.backbone and "blocks" in found.backbone()[1]


def test_a_run_that_trained_something_else_is_refused(tmp_path: Path) -> None:
    leave_run(tmp_path / "other", ImageClassifier(resnet.ResNet(resnet.tiny()), 3), {"x": np.ones(2)})
    with pytest.raises(CheckpointError, match="other trained a ImageClassifier, which reads images, not text"):
        language.load(tmp_path / "other")
    leave_run(tmp_path / "small", Decoder(decoder.tiny()), drawn(Decoder(decoder.tiny())))
    with pytest.raises(CheckpointError, match="the tokenizer has 258 tokens, but the model's embedding has 96 rows"):
        language.load(tmp_path / "small")


@pytest.mark.parametrize("name", ["runs/never_made", "{}/nowhere"])
def test_what_is_not_there_is_not_looked_for_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a run"):
        language.load(name.format(tmp_path))


def test_a_folder_is_opened_with_its_labels(tmp_path: Path) -> None:
    module = Classifier(Decoder(TINY), 2, "last", bias=False)
    params = drawn(module)
    public.save(tmp_path / "model", module, params, tokenizers.train(TEXTS, 258), labels=("bad", "good"))
    found = language.load(tmp_path / "model")
    assert isinstance(found.module, Classifier) and (found.module.pool, found.module.bias) == ("last", False)
    assert found.labels == ("bad", "good") and same(found.params, params)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mystery": 1}))
    with pytest.raises(CheckpointError, match=r"mystery \(1\) is unknown"):
        language.load(tmp_path / "model")
    assert same(language.load(tmp_path / "model", ignore=iter(["mystery"])).params, params)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        language.load(tmp_path / "model", ignore=["mystery"])


@pytest.mark.parametrize(
    ("module", "head", "pool", "hidden", "bias"),
    [
        (Decoder(TINY), "default", "mean", "none", True),
        (Decoder(TINY), "last", "last", "none", False),
        (BERT, "default", "first", "tanh", True),
        (BERT, "first", "first", "tanh", True),
        (BERT, "mean", "mean", "none", True),
        (Encoder(replace(encoder.tiny(), num_types=0)), "default", "first", "relu", True),
        (Encoder(replace(encoder.tiny(), embed_size=16)), "default", "first", "gelu", True),
        (Encoder(replace(encoder.tiny(), embed_size=16, shared=True)), "default", "first", "tanh", True),
    ],
)
def test_each_family_has_its_head(module: Any, head: Any, pool: str, hidden: str, bias: bool) -> None:
    params = drawn(module)
    model, given = language.classifier(Pretrained(module, params, None), ("a", "b", "c"), head)
    assert (model.pool, model.hidden, model.bias, model.num_classes) == (pool, hidden, bias, 3)
    assert given.keys() == {"backbone"} and same(given["backbone"], params)


def test_a_head_of_its_own_stays_behind() -> None:
    module = Decoder(replace(TINY, tied=False))
    _, given = language.classifier(Pretrained(module, drawn(module), None), ("a", "b"))
    assert "head" not in given["backbone"]


def test_a_pooler_trained_on_pairs_is_kept() -> None:
    module = MaskedLM(BERT, next_sentence=True)
    params = drawn(module)
    model, given = language.classifier(Pretrained(module, params, None), ("a", "b"))
    assert same(given, {"backbone": params["backbone"], "head": {"hidden": params["next"]["hidden"]}})
    wanted = families.abstract(model)["head"]["hidden"]
    assert jax.tree.map(np.shape, given["head"]["hidden"]) == jax.tree.map(np.shape, wanted)
    _, without = language.classifier(Pretrained(module, params, None), ("a", "b"), "mean")
    assert "head" not in without


@pytest.mark.parametrize(
    ("labels", "classes", "kept"),
    [
        (("bad", "good"), ("bad", "good"), True),
        (("LABEL_0", "LABEL_1"), ("bad", "good"), True),
        (("good", "bad"), ("bad", "good"), False),
        (("bad", "good"), ("bad", "fair", "good"), False),
        (("LABEL_0", "LABEL_1"), ("bad", "fair", "good"), False),
    ],
)
def test_a_published_head_is_kept_for_the_same_classes_only(
    labels: tuple[str, ...], classes: tuple[str, ...], kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Classifier(BERT, 2, "first", hidden="tanh")
    model, given = language.classifier(Pretrained(module, drawn(module), None, labels), classes)
    assert ("head" in given) == kept and model.num_classes == len(classes) and model.hidden == "tanh"
    assert ("head is randomly initialised" in capsys.readouterr().out) == (not kept)


@pytest.mark.parametrize(
    ("module", "head", "message"),
    [
        (Decoder(TINY), "first", "choose mean or last"),
        (BERT, "last", "choose first or mean"),
        (encoder_decoder.EncoderDecoder(encoder_decoder.tiny()), "default", "needs an encoder or a decoder"),
    ],
)
def test_heads_that_cannot_classify_are_refused(module: Any, head: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        language.classifier(Pretrained(module, {}, None), ("a", "b"), head)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"experiment": "experiments.language.lm_pretrain"}))
    with pytest.raises(CheckpointError, match="no sealed checkpoint"):
        language.load(tmp_path)


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_a_resumed_run_reads_no_weights_of_what_it_started_from(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = drawn(Decoder(TINY))
    if kind == "run":
        leave_run(tmp_path / "old", Decoder(TINY), params)
    else:
        public.save(tmp_path / "old", Decoder(TINY), params, tokenizers.train(TEXTS, 258))
    whole = language.load(tmp_path / "old")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(public.table, "read", read)
    monkeypatch.setattr("fm_jax.checkpoint.read.load_params", read)
    with pytest.raises(AssertionError, match="weights were read"):
        language.load(tmp_path / "old")
    bare = language.load(tmp_path / "old", shapes=True)
    assert bare.module == whole.module and bare.tokenizer is not None
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), bare.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), whole.params
    )
