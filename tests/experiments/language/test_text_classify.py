"""Classifiers on public folders: pairs of texts, heads that go on, and folders to give back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.language import text_classify
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.data.text import labelled, tokenizer
from fm_jax.hub import adapter, families
from fm_jax.hub import pretrained as public
from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.peft import lora
from fm_jax.tasks.init import Init
from fm_jax.tasks.text_classifier import Method
from fm_jax.train import loop
from tests.close import close

pytestmark = pytest.mark.slow
WORDS = "the cat sat on a mat and one dog ran to it".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that agree or not: nothing of it can be seen in one text alone."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6), ("test", 6)):
        rows = []
        for index in range(count):
            first, other = (" ".join(rng.choice(WORDS, 3)) for _ in range(2))
            rows.append({"text": first, "other": first if index % 2 else other, "label": ("no", "yes")[index % 2]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(module: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), families.abstract(module))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    module = MaskedLM(Encoder(replace(encoder.tiny(), vocab_size=60)), next_sentence=True)
    public.save(folder, module, drawn(module), tokenizer.train_wordpiece([" ".join(WORDS)] * 3, 45))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    module = Decoder(replace(decoder.tiny(), vocab_size=260))
    public.save(folder, module, drawn(module), tokenizer.train([" ".join(WORDS)] * 3, 260))
    return folder


def config(model: Path, texts: Path, method: Method, **more: Any) -> text_classify.Config:
    given = {"method": method, "batch_size": 8, "length": 24, "frozen_layers": 1, "learning_rate": 1e-3} | more
    data = labelled.Config(texts, second="other")
    return text_classify.Config(init=Init(model), data=data, fit=loop.FitConfig(3), **given)


def logits(found: public.Pretrained, texts: Path) -> np.ndarray:
    """Classify the test split with nothing but the folder."""
    rows = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    assert found.tokenizer is not None
    encoded = [found.tokenizer.encode_pair(row["text"], row["other"]) for row in rows]
    out = []
    for one in encoded:
        types = (one.types[None],) if one.types.any() else ()
        length = np.array([len(one.ids)], np.int32)
        out.append(found.module.apply({"params": found.params}, one.ids[None], length, *types)[0])
    return np.asarray(out)


@pytest.mark.parametrize("method", ["full", "lora", "frozen"])
def test_a_pair_classifier_is_exported_whole(method: Method, bert: Path, texts: Path, tmp_path: Path) -> None:
    cfg = config(bert, texts, method, export=tmp_path / "mine")
    measured = text_classify.run(cfg, tmp_path / "work")
    found = public.load(tmp_path / "mine")
    assert found.labels == ("no", "yes")
    predicted = logits(found, texts).argmax(axis=1)
    assert measured["test"]["accuracy"] == np.mean(predicted == [0, 1] * 3)
    before, after = tree.flatten(public.load(bert).params["backbone"]), tree.flatten(found.params["backbone"])
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    if method == "lora":
        assert moved == {"blocks/attn/q/kernel", "blocks/attn/v/kernel"}
        alone = adapter.load(tmp_path / "mine" / "adapter", found.module)
        trained, options = lora.load(tmp_path / "work" / "adapter.safetensors", found.params)
        ours, theirs = tree.flatten(trained), tree.flatten(alone.trained)
        close(theirs, ours)
        base = {"backbone": public.load(bert).params["backbone"]}
        whole = tree.flatten(lora.combine(options)(alone.trained, base))
        close(whole["backbone/blocks/attn/q/kernel"], after["blocks/attn/q/kernel"])
    elif method == "full":
        assert moved == set(before)
    else:
        assert "embed/tokens" not in moved and "blocks/mlp/up/kernel" in moved


def test_a_classifier_goes_on_where_it_was(bert: Path, texts: Path, tmp_path: Path) -> None:
    text_classify.run(config(bert, texts, "full", export=tmp_path / "one"), tmp_path / "work")
    still = config(tmp_path / "one", texts, "probe", export=tmp_path / "two")
    text_classify.run(replace(still, learning_rate=0.0), tmp_path / "again")
    one, two = (tree.flatten(public.load(tmp_path / name).params) for name in ("one", "two"))
    assert all(np.array_equal(one[path], two[path]) for path in one)


@pytest.mark.parametrize("place", ["/proc/none/mine", "file/mine", "full"])
def test_a_place_where_nothing_can_be_exported_is_refused_before_the_training(
    place: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    monkeypatch.setattr(text_classify.stage, "open_mesh", lambda _: pytest.fail("the run began"))
    with pytest.raises(CheckpointError, match=rf"^{place} (cannot be written: |exists already)"):
        text_classify.run(config(tmp_path / "no model", texts, "full", export=Path(place)), tmp_path / "work")


def test_a_resumed_run_reads_no_pretrained_weights(
    bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(bert, texts, "lora")
    measured = text_classify.run(cfg, tmp_path / "work")
    monkeypatch.setattr(public.table, "read", lambda *_, **__: pytest.fail("weights were read"))
    assert text_classify.run(cfg, tmp_path / "work") == measured


def test_a_decoders_last_state_is_exported(gpt2: Path, texts: Path, tmp_path: Path) -> None:
    text_classify.run(config(gpt2, texts, "lora", head="last", export=tmp_path / "mine"), tmp_path / "work")
    found = public.load(tmp_path / "mine")
    assert (found.module.pool, found.module.bias) == ("last", False)  # type: ignore[attr-defined]
    assert adapter.load(tmp_path / "mine" / "adapter", found.module).rank >= 8
