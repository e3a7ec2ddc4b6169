import pickle
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.text import tokenizer, tokens
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.data.text.tokens import Tokens


class Texts:
    """Documents in memory; None stands for one that cannot be read."""

    def __init__(self, *texts: str | None) -> None:
        self._texts, self.fingerprint = texts, f"texts-{len(texts)}"

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        if (text := self._texts[index]) is None:
            raise DataError("file.jsonl:3: not JSON")
        return text


DOCUMENTS = tuple(f"document {i}: " + "é" * i for i in range(30))


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return tokenizer.train(DOCUMENTS, 270)


@pytest.fixture
def written(learned: Tokenizer, tmp_path: Path) -> Tokens:
    return tokens.write(Texts(*DOCUMENTS), learned, tmp_path / "train")


def test_the_stream_is_every_document_between_end_tokens(written: Tokens, learned: Tokenizer) -> None:
    stream = written[:]
    end = learned.end_id
    wanted = [end]
    for text in DOCUMENTS:
        wanted += [*learned.encode(text).tolist(), end]
    assert stream.tolist() == wanted and len(written) == len(wanted)
    assert stream[written.starts].tolist() == [end] * (len(DOCUMENTS) + 1)
    for text, start, stop in zip(DOCUMENTS, written.starts, written.starts[1:], strict=False):
        assert learned.decode(written[start + 1 : stop]) == text


def test_bytes_are_those_of_the_text(written: Tokens) -> None:
    assert written.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert written.index.num_documents == len(DOCUMENTS)
    assert (written.folder / "tokens.bin").stat().st_size == 2 * len(written)


def test_chunks_do_not_change_what_is_written(
    learned: Tokenizer, written: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 20)
    again = tokens.write(Texts(*DOCUMENTS), learned, tmp_path / "again")
    assert again.index == written.index and (again.starts == written.starts).all()


def test_a_worker_gets_the_folder_and_not_the_tokens(written: Tokens) -> None:
    _ = written[:10], written.starts
    sent = pickle.dumps(written)
    assert len(sent) < 1000
    assert (pickle.loads(sent)[:] == written[:]).all()  # noqa: S301  (pickled three lines above)


def test_what_was_there_is_replaced_whole(learned: Tokenizer, written: Tokens) -> None:
    again = tokens.write(Texts("another"), learned, written.folder)
    assert again.fingerprint != written.fingerprint
    assert learned.decode(again[:]) == "another"
    assert [path.name for path in written.folder.parent.iterdir()] == ["train"]


def test_a_process_that_was_faster_with_the_same_tokens_is_not_disturbed(learned: Tokenizer, written: Tokens) -> None:
    before = (written.folder / "tokens.bin").stat().st_ino
    tokens.write(Texts(*DOCUMENTS), learned, written.folder)
    assert (written.folder / "tokens.bin").stat().st_ino == before
    assert [path.name for path in written.folder.parent.iterdir()] == ["train"]


def test_a_document_that_cannot_be_read_leaves_what_was_there(learned: Tokenizer, written: Tokens) -> None:
    with pytest.raises(DataError, match=r"file.jsonl:3: not JSON"):
        tokens.write(Texts("one", None), learned, written.folder)
    assert tokens.load(written.folder, verify=True).index == written.index
    assert [path.name for path in written.folder.parent.iterdir()] == ["train"]


def test_no_documents_are_refused(learned: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents to write"):
        tokens.write(Texts(), learned, tmp_path / "train")
    assert not list(tmp_path.iterdir())


def test_a_large_vocabulary_takes_four_bytes(
    learned: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "vocab_size", 70_000)
    wide = tokens.write(Texts(*DOCUMENTS), learned, tmp_path / "wide")
    assert wide.index.dtype == "<u4" and (wide.folder / "tokens.bin").stat().st_size == 4 * len(wide)
    assert wide[:].dtype == np.int32


def test_a_missing_a_short_and_a_damaged_file_are_named(written: Tokens, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere has no index.json"):
        tokens.load(tmp_path / "nowhere")
    file = written.folder / "tokens.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert len(tokens.load(written.folder)) == len(written)
    with pytest.raises(DataError, match=r"tokens.bin is damaged: its hash differs"):
        tokens.load(written.folder, verify=True)
    file.write_bytes(data[:-2])
    with pytest.raises(DataError, match=rf"tokens.bin has {len(data) - 2} bytes, not {len(data)}"):
        tokens.load(written.folder)
    (written.folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index.json is damaged"):
        tokens.load(written.folder)
