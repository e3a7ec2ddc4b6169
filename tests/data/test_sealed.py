"""A sealed index is read as it was written or not at all, and a verified folder is read again if anything changed."""

import json
import os
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data import sealed

FIELDS = {"name": "é", "count": 3, "names": ["a", "b"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.bin").write_bytes(b"content")
    sealed.write(tmp_path, FIELDS, ("data.bin",))
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    fields, digests = sealed.read(folder, "data")
    assert fields == FIELDS and digests is not None and list(digests) == ["data.bin"]
    sealed.verify(folder, digests)
    with pytest.raises(FileExistsError):
        sealed.write(folder, FIELDS)


def test_no_flipped_bit_and_no_other_spelling_is_read(folder: Path) -> None:
    file = folder / "index.json"
    data = file.read_bytes()
    for position in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(DataError, match=r"index.json is damaged"):
            sealed.read(folder, "data")
    told = json.loads(data)
    for other in ({"seal": told["seal"]}, {"digests": {}}, told | {"digests": 3}, [told], "x"):
        file.write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"index.json is damaged"):
            sealed.read(folder, "data")


def test_hostile_json_is_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}", "", "{}{}"):
        (folder / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index.json is damaged"):
            sealed.read(folder, "data")
    monkeypatch.setattr(sealed, "_LONGEST", 10)
    (folder / "index.json").write_text(" " * 11)
    with pytest.raises(DataError, match=r"index.json is damaged: .* is larger than 10 bytes"):
        sealed.read(folder, "data")


def test_a_large_folder_is_read_once_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_MARK_FROM", 1)
    _, digests = sealed.read(folder, "data")
    assert digests is not None
    file, hidden = folder / "data.bin", folder / ".verified.json"
    read: list[str] = []
    real = sealed._sha256
    monkeypatch.setattr(sealed, "_sha256", lambda file: read.append(file.name) or real(file))
    sealed._remembered.cache_clear()

    def verify() -> int:
        """Verify as another process would, and return how often the file was read."""
        read.clear()
        sealed._remembered.cache_clear()
        sealed.verify(folder, digests)
        return len(read)

    assert verify() == 1 and not hidden.exists()  # it changed a moment ago and could change again unseen
    os.utime(file, (1e9, 1e9))
    assert verify() == 1 and hidden.exists()
    assert verify() == 0
    os.utime(file, (1e9, 1e9 + 1))
    assert verify() == 1 and verify() == 0
    hidden.write_text("x")
    assert verify() == 1 and verify() == 0
    file.write_bytes(b"kontent")
    os.utime(file, (1e9, 1e9))
    with pytest.raises(DataError, match=r"data.bin is damaged: its hash differs from index.json"):
        verify()
