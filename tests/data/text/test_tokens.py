import builtins
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import DataError, ResourceError
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


ROOT = Path(__file__).parents[3]
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
    assert tokens.load(written.folder).index == written.index
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


def test_a_missing_a_short_and_an_empty_file_are_named(written: Tokens, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere has no index.json; it does not hold tokens"):
        tokens.load(tmp_path / "nowhere")
    file = written.folder / "tokens.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(DataError, match=rf"tokens.bin has {len(data) - 2} bytes, not {len(data)}"):
        tokens.load(written.folder)
    file.unlink()
    with pytest.raises(DataError, match=r"tokens.bin does not exist"):
        tokens.load(written.folder)
    (written.folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index.json is damaged"):
        tokens.load(written.folder)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "index.json"])
def test_no_flipped_bit_and_no_cut_opens(name: str, written: Tokens) -> None:
    file = written.folder / name
    data = file.read_bytes()
    for position in range(0, len(data), 1 + len(data) // 50):
        for bit in (0, 3, 7):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            with pytest.raises(DataError, match=rf"{name} is damaged"):
                tokens.load(written.folder)
    for length in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"{name} (is damaged|has \d+ bytes)"):
            tokens.load(written.folder)
    file.write_bytes(data)
    assert (tokens.load(written.folder)[:] == written[:]).all()


def unsealed(tokens: Tokens, **changes: object) -> None:
    """Write index.json as it was before there were seals."""
    (tokens.folder / "index.json").write_text(json.dumps(asdict(tokens.index) | changes, indent=1))


def test_a_folder_without_a_seal_opens_with_a_warning(written: Tokens, caplog: pytest.LogCaptureFixture) -> None:
    unsealed(written)
    found = tokens.load(written.folder)
    assert found.fingerprint == written.fingerprint and (found.starts == written.starts).all()
    (line,) = caplog.messages
    assert "was written without a seal: its numbers cannot be verified; write it again" in line


def test_damage_to_a_folder_without_a_seal_is_found_where_the_content_shows_it(written: Tokens) -> None:
    for changes in (
        {"dtype": "<u4"}, {"dtype": "O"}, {"num_tokens": -1}, {"num_tokens": "9"}, {"num_documents": 29}, {"end_id": 7},
        {"vocab_size": 1}, {"pad_id": 10**9}, {"num_bytes": -1}, {"sha256": "0" * 64}, {"made_from": None}, {"more": 1},
    ):  # fmt: skip
        unsealed(written, **changes)
        with pytest.raises(DataError, match=r"(index.json|documents.npy|tokens.bin) (is damaged|has \d+ bytes)"):
            tokens.load(written.folder)
    unsealed(written)
    file = written.folder / "documents.npy"
    data = file.read_bytes()
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 4
        file.write_bytes(flipped)
        try:  # spaces of numpy's header may change
            assert (tokens.load(written.folder).starts == written.starts).all()
        except DataError as error:
            assert "documents.npy is damaged" in str(error)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "index.json"])
def test_a_pipe_and_a_broken_link_are_refused_by_name(name: str, written: Tokens) -> None:
    file = written.folder / name
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(DataError, match=rf"{name} is a link to gone, which does not exist"):
        tokens.load(written.folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match=rf"{name} is a pipe, not a file"):
        tokens.load(written.folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "index.json"])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(
    name: str, code: int, learned: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.open

    def refuse(file: object, mode: str = "r", *rest: object, **options: object) -> object:
        if str(file).endswith(name) and mode[0] in "wx":
            raise OSError(code, os.strerror(code), str(file))
        return real(file, mode, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", refuse)
    wanted = DataError if code == errno.EACCES else ResourceError
    with pytest.raises(wanted, match=rf"^cannot write tokens to {tmp_path}/train: ") as error:
        tokens.write(Texts(*DOCUMENTS), learned, tmp_path / "train")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    code = f"""
import resource
from fm_jax.core.errors import ResourceError
from fm_jax.data.text import tokenizer, tokens
from tests.data.text.test_tokens import DOCUMENTS, Texts
from pathlib import Path
learned = tokenizer.train(DOCUMENTS, 270)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    tokens.write(Texts(*DOCUMENTS), learned, Path({str(tmp_path / "train")!r}))
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "cannot write tokens to" in done.stdout and "limit on a file's size (ulimit -f)" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_build_that_is_killed_leaves_nothing_that_opens(learned: Tokenizer, tmp_path: Path) -> None:
    class Killing(Texts):
        def __getitem__(self, index: int) -> str:
            if index == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    child = os.fork()
    if not child:
        tokens.write(Killing(*DOCUMENTS), learned, tmp_path / "train")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "train").exists()
    assert (tokens.write(Texts(*DOCUMENTS), learned, tmp_path / "train")[:1] == learned.end_id).all()
