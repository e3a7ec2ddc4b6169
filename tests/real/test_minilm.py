"""MiniLM as it is published: a bare BERT, equal to transformers in every layer, in its ids and after a round trip."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from experiments.hub import hub_verify
from fm_jax.hub import pretrained
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language.sentence import SentenceEncoder

pytestmark = pytest.mark.real
SENTENCES = (
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
)
COSINES = (0.6946, 0.9429, 0.2569)  # of the first with each of the others, as the model's page has them
PAGE = (
    "The quick brown fox; isn't it?  $3.50 (e.g.) — naïve café, Zürich, ÅNGSTRÖM, İstanbul, ﬁne ﬂow ½ x² \t\n",
    "Größe, Straße, Übergang. L'été dernier, où étiez-vous ? ¿Dónde está la biblioteca? ¡Ahí!",
    "Москва слезам не верит. Ελληνικά γράμματα, Ωμέγα. עברית וגם ניקוד: שָׁלוֹם. العربية مع التشكيل: مَرْحَبًا",
    "日本語のテキスト、漢字とカタカナ。中文字符，測試。한국어 문장입니다. हिन्दी वाक्य है। ภาษาไทยไม่มีช่องว่าง",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 and zero-width\u200bspace, soft\u00adhyphen, nul\x00, \ufffd, [mask] ##ing Llanfairpwllgwyngyll"
    + "a" * 120,
    "",
)


@pytest.fixture(scope="module")
def minilm(fetched: Callable[[str], Path]) -> Path:
    return fetched("minilm")


@pytest.fixture(scope="module")
def model(minilm: Path) -> Pretrained:
    return pretrained.load(minilm)


def vectors(model: Pretrained, texts: tuple[str, ...]) -> np.ndarray:
    ids = [model.tokenizer.encode_pair(text).ids for text in texts]
    length = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), length.max()), np.int32)
    for row, mine in zip(tokens, ids, strict=True):
        row[: len(mine)] = mine
    encoder = SentenceEncoder(model.module, normalise=True)
    return np.asarray(jax.jit(encoder.apply)({"params": {"backbone": model.params}}, tokens, length))


def test_every_layer_is_that_of_transformers(minilm: Path, tmp_path: Path) -> None:
    measured = hub_verify.run(hub_verify.Config(folder=minilm), tmp_path)
    assert len(measured["errors"]) >= 8  # embeddings, six layers, the last state
    assert measured["largest"] <= measured["tolerance"]  # without the room for magnified rounding


def test_the_cosines_are_those_that_are_published(model: Pretrained) -> None:
    first, *others = vectors(model, SENTENCES)
    assert tuple(round(float(first @ other), 4) for other in others) == COSINES


def test_the_ids_are_those_of_transformers(minilm: Path, model: Pretrained) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    for text in PAGE:
        assert list(model.tokenizer.encode(text)) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_transformers_opens_what_we_save(model: Pretrained, minilm: Path, tmp_path: Path) -> None:
    import torch

    pretrained.save(tmp_path / "again", model.module, model.params, model.tokenizer)
    tokens = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        before, after = (
            transformers.AutoModel.from_pretrained(folder)(tokens).last_hidden_state.numpy()
            for folder in (minilm, tmp_path / "again")
        )
    np.testing.assert_array_equal(after, before)
