"""Where the translator's model comes from, and what its results are made of."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.language import t5_translate
from fm_jax.checkpoint import model as models
from fm_jax.checkpoint.store import Store
from fm_jax.core import mesh as meshes
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.types import Params
from fm_jax.data.text import tokenizer
from fm_jax.data.text.parallel import Parallel
from fm_jax.hub import pretrained
from fm_jax.models.language import decoder, encoder_decoder
from fm_jax.tasks.init import Init
from fm_jax.train import state

TEXTS = ["The man sees the dog.", "Der Mann sieht den Hund.", "Today we sing.", "Heute singen wir."]
WORDS = tokenizer.train(TEXTS * 4, 290, sentinels=6)
MESH = meshes.make_mesh(meshes.MeshConfig())


@pytest.fixture(scope="module")
def made() -> tuple[encoder_decoder.EncoderDecoder, Params]:
    module = encoder_decoder.EncoderDecoder(replace(encoder_decoder.tiny(), vocab_size=290))
    tokens = np.zeros((1, 4), np.int32)
    return module, state.init_params(module, (tokens, tokens), jax.random.key(5), MESH)


def opened(path: Path) -> t5_translate.Opened:
    cfg = t5_translate.debug()
    cfg = replace(cfg, init=Init(path), model=encoder_decoder.with_dropout(cfg.model, 0.1))
    return t5_translate.open_model(cfg, Parallel(TEXTS[::2], TEXTS[1::2]), MESH)


def check(found: t5_translate.Opened, params: Params) -> None:
    assert found.params is not None
    jax.tree.map(np.testing.assert_array_equal, params, found.params)
    cfg = found.module.cfg
    assert (cfg.max_length, cfg.dropout, cfg.attention.dropout, cfg.vocab_size) == (41, 0.1, 0.1, 290)
    assert found.tokenizer.encode(TEXTS[1]).tolist() == WORDS.encode(TEXTS[1]).tolist()
    assert found.tokenizer.pad_id == 0 and found.tokenizer.end_id == WORDS.end_id


def test_a_public_folder_is_opened_with_its_weights_and_tokenizer(
    made: tuple[encoder_decoder.EncoderDecoder, Params], tmp_path: Path
) -> None:
    pretrained.save(tmp_path / "t5", *made, WORDS)
    check(opened(tmp_path / "t5"), made[1])


def test_a_work_directory_of_pretraining_is_opened(
    made: tuple[encoder_decoder.EncoderDecoder, Params], tmp_path: Path
) -> None:
    module, params = made
    WORDS.save(tmp_path / "tokenizer")
    import optax

    begun = state.create(params, optax.sgd(0.1), ema=False)
    with Store(tmp_path / "checkpoints", meta={"config": {}, "model": models.describe(module)}) as store:
        store.save(1, begun, {}, None)
    check(opened(tmp_path), params)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    module = decoder.Decoder(replace(decoder.gpt(1, 16, 2, vocab_size=290, max_length=8)))
    params = state.init_params(module, [np.zeros((1, 4), np.int32)], jax.random.key(0), MESH)
    pretrained.save(tmp_path / "gpt", module, params, WORDS)
    with pytest.raises(ConfigError, match="not an encoder-decoder"):
        opened(tmp_path / "gpt")


def test_a_place_for_data_that_is_never_written_is_refused() -> None:
    with pytest.raises(ConfigError, match="data_dir must be none"):
        replace(t5_translate.debug(), data_dir=Path("kept"))


def test_generated_splits_are_unseen_and_labelled() -> None:
    data = t5_translate.load(t5_translate.Data(train=3_000, validation=50, test=80))
    assert (len(data.train), len(data.validation), len(data.test), len(data.labels)) == (3_000, 50, 80, 80)
    assert t5_translate.seen(data.train, data.test) == 0
    assert t5_translate.seen(data.test, data.test) == 80
    half = Parallel(["new", data.test.sources[3]], [data.test.targets[0], "neu"])
    assert t5_translate.seen(half, data.test) == 2


def test_a_folder_takes_the_place_of_the_generated_sentences(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"source": TEXTS[0], "target": TEXTS[1]})] * 2
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    data = t5_translate.load(t5_translate.Data(path=tmp_path))
    assert data.labels == [] and data.test.targets == [TEXTS[1]] * 2
    cfg = t5_translate.debug()
    found = t5_translate.judge(cfg, data, {"greedy": [TEXTS[1], "Der Hund."], "beams of 4": [TEXTS[1]] * 2})
    assert found["test"]["beams of 4"]["exact"] == 1 and found["test"]["greedy"]["exact"] == 0.5
    assert found["test"]["copied source"]["exact"] == 0 and "exact_by_phenomenon" not in found
    assert {"source", "reference", "greedy", "beams of 4"} == set(found["samples"][0])
    with pytest.raises(DataError, match="does not exist"):
        t5_translate.load(t5_translate.Data(path=tmp_path / "elsewhere"))
