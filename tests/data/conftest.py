"""One small corpus of a few real packages, made once a session."""

from pathlib import Path

import pytest

from fm_jax.data.text import corpus, documents
from fm_jax.data.text.corpus import Corpus

# Three of the labelled packages, so that every split has modules, and two plain ones.
ONLY = ("email", "http", "queue", "textwrap", "wsgiref")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def small(data_dir: Path) -> Corpus:
    return corpus.prepare(documents.Config(only=ONLY), data_dir, vocab_size=400)
