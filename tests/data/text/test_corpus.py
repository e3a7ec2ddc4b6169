import shutil
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.text import corpus, documents, records, tokenizer, tokens
from fm_jax.data.text.corpus import Corpus
from fm_jax.data.text.documents import Config

ONLY = ("email", "http", "queue", "textwrap", "wsgiref")


def test_it_is_made_once(small: Corpus, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(tokenizer, "train", refuse)
    monkeypatch.setattr(tokens, "write", refuse)
    monkeypatch.setattr(documents, "documents", refuse)
    again = corpus.prepare(Config(only=ONLY), data_dir, vocab_size=400)
    assert again.folder == small.folder and again.tokenizer.fingerprint == small.tokenizer.fingerprint


def test_another_vocabulary_or_other_documents_go_elsewhere(small: Corpus, data_dir: Path) -> None:
    other = corpus.prepare(Config(only=ONLY), data_dir, vocab_size=300, splits=("validation",))
    assert other.folder != small.folder and other.tokenizer.vocab_size == 300
    assert not (other.folder / "train").exists()


def test_the_tokens_are_the_documents(small: Corpus, data_dir: Path) -> None:
    for split in documents.SPLITS:
        found, stream = documents.documents(Config(only=ONLY), split, data_dir), small.tokens(split)
        texts = [found[i] for i in range(len(found))]
        assert stream.num_bytes == sum(len(text.encode()) for text in texts)
        assert small.tokenizer.decode(stream[:]) == "".join(texts)


def test_the_tokenizer_learns_from_train_alone(small: Corpus, data_dir: Path) -> None:
    found = documents.documents(Config(only=ONLY), "train", data_dir)
    again = tokenizer.train([found[i] for i in range(len(found))], 400)
    assert again.fingerprint == small.tokenizer.fingerprint


def test_a_large_corpus_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Documents:
        fingerprint = ""

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> str:
            return f"{index:010d}"

    assert sorted(corpus._sample(Documents())) == [f"{i:010d}" for i in range(1000)]
    monkeypatch.setattr(corpus, "_TRAIN_ON", 500)
    found = [int(text) for text in corpus._sample(Documents())]
    assert len(set(found)) == 50
    assert {number // 100 for number in found} == set(range(10))


def test_documents_that_changed_are_tokenised_again(tmp_path: Path) -> None:
    for split in documents.SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(f"the words of {split} " * 20)
    cfg = Config(kind="text", path=tmp_path)
    before = corpus.prepare(cfg, tmp_path / "made", vocab_size=262)
    (tmp_path / "test" / "a.txt").write_text("quite other words")
    after = corpus.prepare(cfg, tmp_path / "made", vocab_size=262)
    assert after.folder == before.folder
    assert after.tokenizer.decode(after.tokens("test")[:]) == "quite other words"
    assert after.tokens("train").fingerprint == before.tokens("train").fingerprint


def test_damage_is_found_when_it_is_opened_again(small: Corpus, data_dir: Path, tmp_path: Path) -> None:
    corpora = shutil.copytree(data_dir, tmp_path / "copy")
    file = corpora / "corpora" / small.folder.name / "train" / "tokens.bin"
    data = bytearray(file.read_bytes())
    data[1000] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"tokens.bin is damaged"):
        corpus.prepare(Config(only=ONLY), corpora, vocab_size=400)


def test_tokens_made_elsewhere_open_by_config(small: Corpus, tmp_path: Path) -> None:
    records.write(small.tokens("train"), tmp_path / "learn", length=32)
    shutil.copytree(small.folder / "validation", tmp_path / "check")
    small.tokenizer.save(tmp_path)
    cfg = Config(kind="tokens", path=tmp_path, splits=("learn", "check", "test"))
    found = corpus.prepare(cfg, tmp_path / "unused", vocab_size=400)
    train, validation = found.blocks("train", 32), found.blocks("validation", 32)
    assert train.fingerprint == small.blocks("train", 32).fingerprint
    assert validation.fingerprint == small.blocks("validation", 32).fingerprint
    assert [found.num_bytes(split) for split in ("train", "validation")] == [
        small.num_bytes(split) for split in ("train", "validation")
    ]
    with pytest.raises(DataError, match="blocks of 32 tokens and cannot give blocks of 64"):
        found.blocks("train", 64)
    with pytest.raises(DataError, match="cannot give separate documents"):
        found.blocks("train", 32, apart=True)
    with pytest.raises(DataError, match="400"):
        corpus.prepare(cfg, tmp_path / "unused", vocab_size=512)
    with pytest.raises(DataError, match="does not hold token"):
        found.blocks("test", 32)
    (tmp_path / "check").rename(tmp_path / "dev")
    usual = corpus.prepare(Config(kind="tokens", path=tmp_path), tmp_path / "unused", vocab_size=400)
    assert usual.tokens("validation").fingerprint == small.tokens("validation").fingerprint
