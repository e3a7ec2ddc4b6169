from pathlib import Path

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.python_docs import dataset, library
from fm_jax.data.text import documents
from fm_jax.data.text.corpus import Corpus
from fm_jax.data.text.documents import Config

ONLY = ("email", "http", "queue", "textwrap", "wsgiref")


def test_the_built_in_corpus_gives_a_document_a_module(small: Corpus, data_dir: Path) -> None:
    found = documents.documents(Config(only=ONLY), "test", data_dir)
    wanted = [module.text for module in library.read(ONLY) if module.split == "test"]
    assert [found[i] for i in range(len(found))] == wanted
    assert found.fingerprint == documents.fingerprint(Config(only=ONLY), "test", data_dir)


def test_a_prepared_corpus_of_the_catalogue_opens_by_name(small: Corpus, data_dir: Path) -> None:
    name = f"python_docs/{dataset.build(data_dir, 'modules', only=ONLY).builder_config.name}"
    cfg = Config(kind="tfds", name=name, splits=("train[:50%]", "train[50%:]", "test"))
    whole = documents.documents(Config(kind="tfds", name=name), "train", data_dir)
    halves = [documents.documents(cfg, split, data_dir) for split in ("train", "validation")]
    assert [half[i] for half in halves for i in range(len(half))] == [whole[i] for i in range(len(whole))]
    assert halves[0].fingerprint != halves[1].fingerprint


def test_a_field_or_split_that_is_not_there_is_named(small: Corpus, data_dir: Path) -> None:
    name = f"python_docs/{dataset.build(data_dir, 'modules', only=ONLY).builder_config.name}"
    with pytest.raises(DataError, match=r"has no field 'body'; it has .*text"):
        documents.documents(Config(kind="tfds", name=name, field="body"), "train", data_dir)
    with pytest.raises(DataError, match=r"cannot open split 'dev' of python_docs.* \(it has .*train"):
        documents.documents(Config(kind="tfds", name=name, splits=("train", "dev", "test")), "validation", data_dir)


def test_a_corpus_that_is_not_prepared_says_what_to_do_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lm1b is not prepared under .*; set download to true") as caught:
        documents.documents(Config(kind="tfds", name="lm1b"), "train", tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_corpus_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tensorflow-datasets has no data set 'no_such_corpus'") as caught:
        documents.documents(Config(kind="tfds", name="no_such_corpus"), "train", tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    builder = dataset.build(tmp_path, "modules", only=("textwrap",))
    (file,) = builder.data_path.glob("*train.array_record*")
    data = bytearray(file.read_bytes())
    data[600:664] = bytes(64)  # inside the first record; most of a small file is padding
    file.write_bytes(data)
    with pytest.raises(DataError, match="python_docs/train: cannot read record 0"):
        documents.documents(Config(only=("textwrap",)), "train", tmp_path)[0]


def test_tokens_are_no_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds tokens, not documents"):
        documents.documents(Config(kind="tokens", path=tmp_path), "train", tmp_path)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'dev'; choose train, validation, test"):
        documents.documents(Config(), "dev", tmp_path)
