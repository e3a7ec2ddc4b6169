"""Tokenised documents in one flat, memory-mapped file.

A folder holds `tokens.bin` (uint16 or uint32, little endian), `documents.npy` (where each document starts) and
`index.json`. The stream is END d₀ END d₁ END … END: every document lies between two end-of-text tokens, so its first
token is predicted from END, and its end is predicted too. Reading a block takes microseconds.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.config import from_dict
from fm_jax.core.errors import ConfigError, DataError, shown
from fm_jax.data.text.documents import Documents
from fm_jax.data.text.tokenizer import Tokenizer

_CHUNK = 1 << 20  # characters per call of the tokenizer


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    dtype: str
    num_tokens: int  # including the end-of-text tokens
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents, for bits per byte
    vocab_size: int
    end_id: int
    pad_id: int
    sha256: str  # hash of tokens.bin
    made_from: str  # fingerprints of the documents and the tokenizer

    def __post_init__(self) -> None:
        """Refuse what cannot be the index of any tokens."""
        check_index(
            self.dtype, num_tokens=self.num_tokens, num_documents=self.num_documents, vocab_size=self.vocab_size
        )


class Tokens:
    """A stream of N tokens and the starts of its documents; opened by `load`, cheap to pickle."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def __len__(self) -> int:
        return self.index.num_tokens

    def __getitem__(self, where: slice) -> np.ndarray:
        """Return a slice of the stream as int32 [n]."""
        return self._stream[where].astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy all of it; a worker opens its own.
        return {"folder": self.folder, "index": self.index}

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents. Bits per byte = nats summed over all targets / ln 2 / num_bytes."""
        return self.index.num_bytes

    @property
    def vocab_size(self) -> int:
        """Exclusive upper bound of the ids."""
        return self.index.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens: equal on every machine with the same tokens."""
        return self.index.sha256[:16]

    @cached_property
    def starts(self) -> np.ndarray:
        """Positions of each document's leading end-of-text token, then of the final one: int64 [documents + 1]."""
        return np.load(self.folder / "documents.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def _stream(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=self.index.dtype, mode="r", shape=(self.index.num_tokens,))


def write(documents: Documents, tokenizer: Tokenizer, folder: Path) -> Tokens:
    """Tokenise documents into `folder`, which is created atomically and replaces an older one.

    Raises:
        DataError: no documents, or an unreadable one (the message names file and line).
    """
    if not len(documents):
        raise DataError(f"there are no documents to write to {folder}")
    partial = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.tmp")  # process ids repeat across machines
    partial.mkdir(parents=True)
    try:
        index = _fill(documents, tokenizer, partial)
        (partial / "index.json").write_text(json.dumps(asdict(index), indent=1), "utf-8")
        _move(partial, folder, index)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load(folder)


def load(folder: Path, *, verify: bool = False) -> Tokens:
    """Open tokens written by `write`.

    Args:
        folder: the folder given to `write`.
        verify: also read the whole file and compare its hash (about a second per gigabyte).

    Raises:
        DataError: missing, truncated or damaged.
    """
    if not (folder / "index.json").exists():
        raise DataError(f"{folder} has no index.json; it does not hold tokens")
    try:
        index = from_dict(Index, json_file.read(folder / "index.json", DataError))
    except ConfigError as error:
        raise DataError(f"{folder / 'index.json'} is damaged: {error}") from error
    file = folder / "tokens.bin"
    size = file.stat().st_size if file.is_file() else -1
    wanted = index.num_tokens * np.dtype(index.dtype).itemsize
    if size != wanted:
        raise DataError(f"{file} has {size} bytes, not {wanted}; delete {folder} and tokenise again")
    if verify and _sha256(file) != index.sha256:
        raise DataError(f"{file} is damaged: its hash differs from index.json; delete {folder} and tokenise again")
    return Tokens(folder, index)


def check_index(dtype: str, **counts: int) -> None:
    """Check the dtype and the counts of an index.json.

    Raises:
        ConfigError: no dtype of token ids, or a count that is below 1 or that no disk could hold.
    """
    if dtype not in ("<u2", "<u4"):
        raise ConfigError(f"dtype {shown(dtype)} is not <u2 or <u4")
    for name, count in counts.items():
        if not 0 < count < 1 << 48:
            raise ConfigError(f"{name} is {count}, which is out of range")


def made_from(documents: str, tokenizer: Tokenizer) -> str:
    """Return the fingerprint of tokens made from these documents by this tokenizer."""
    return f"{documents}+{tokenizer.fingerprint}"


def _fill(documents: Documents, tokenizer: Tokenizer, folder: Path) -> Index:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = np.array([tokenizer.end_id], dtype)
    digest, starts, written, num_bytes = hashlib.sha256(), [], 0, 0
    with open(folder / "tokens.bin", "wb") as file:
        for texts in _chunks(documents):
            num_bytes += sum(len(text.encode()) for text in texts)
            pieces = []
            for ids in tokenizer.encode_batch(texts):
                starts.append(written)
                pieces += [end, ids.astype(dtype)]
                written += 1 + len(ids)
            data = np.concatenate(pieces).tobytes()
            digest.update(data)
            file.write(data)
        digest.update(end.tobytes())
        file.write(end.tobytes())
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / "documents.npy", np.array([*starts, written], np.int64), allow_pickle=False)
    return Index(
        dtype=dtype.str,
        num_tokens=written + 1,
        num_documents=len(starts),
        num_bytes=num_bytes,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
        sha256=digest.hexdigest(),
        made_from=made_from(documents.fingerprint, tokenizer),
    )


def _chunks(documents: Documents) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for index in range(len(documents)):
        texts.append(documents[index])
        size += len(texts[-1])
        if size >= _CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _move(partial: Path, folder: Path, index: Index) -> None:
    """Move a finished folder into place; if another process already put the same contents there, keep theirs."""
    for _ in range(3):
        try:
            os.replace(partial, folder)
            return
        except OSError:  # a folder that is not empty cannot be replaced in one step
            with contextlib.suppress(DataError):
                if load(folder, verify=True).index == index:
                    return
        old = folder.with_name(f"{partial.name}.old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    raise DataError(f"cannot move {partial} to {folder}; stop any other process that writes there")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
