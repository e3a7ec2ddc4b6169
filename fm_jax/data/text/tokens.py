"""Tokenised documents in one flat, memory-mapped file.

A folder holds `tokens.bin` (uint16 or uint32, little endian), `documents.npy` (where each document starts) and
`index.json`, which has the digests of both (see `data/sealed.py`): damage to any of them is found at opening, so equal
fingerprints are equal tokens. The stream is END d₀ END d₁ END … END: every document lies between two end-of-text
tokens, so its first token is predicted from END, and its end is predicted too. Reading a block takes microseconds.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data import files, sealed
from fm_jax.data.text.documents import Documents
from fm_jax.data.text.tokenizer import Tokenizer

_CHUNK = 1 << 20  # characters per call of the tokenizer
_FILES = ("tokens.bin", "documents.npy")
_log = logging.getLogger(__name__)


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
        DataError: no documents, or an unreadable one (the message names file and line); the folder cannot be written.
        ResourceError: no space, or a limit of the system.
    """
    if not len(documents):
        raise DataError(f"there are no documents to write to {folder}")
    partial = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.tmp")  # process ids repeat across machines
    try:
        partial.mkdir(parents=True)
        index = _fill(documents, tokenizer, partial)
        sealed.write(partial, asdict(index), _FILES)
        _move(partial, folder, index)
    except OSError as error:
        raise files.failed(error, f"cannot write tokens to {folder}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load(folder)


def load(folder: Path) -> Tokens:
    """Open tokens written by `write`, and compare their content with the digests (half a second per gigabyte).

    A folder written before there were digests of everything opens with a warning: its tokens are compared with their
    hash, its document starts with the tokens; nothing tells whether the other numbers in index.json are right.

    Raises:
        DataError: missing, truncated or damaged.
    """
    told, digests = sealed.read(folder, "tokens")
    index = _index(told, folder)
    if digests is not None and set(digests) != set(_FILES):
        raise DataError(f"{folder / sealed.NAME} seals {', '.join(digests)}, not {' and '.join(_FILES)}")
    file = folder / "tokens.bin"
    size, wanted = files.check(file).st_size, index.num_tokens * np.dtype(index.dtype).itemsize
    if size != wanted:
        raise DataError(f"{file} has {size} bytes, not {wanted}; {sealed.AGAIN}")
    sealed.verify(folder, {"tokens.bin": index.sha256} if digests is None else digests)
    found = Tokens(folder, index)
    if digests is None:
        _check_starts(found)
        _log.warning("%s was written without a seal: its numbers cannot be verified; write it again to seal it", folder)
    return found


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
    held = io.BytesIO()  # numpy reports a full disk without saying so
    np.save(held, np.array([*starts, written], np.int64), allow_pickle=False)
    with open(folder / "documents.npy", "wb") as file:
        file.write(held.getbuffer())
        file.flush()
        os.fsync(file.fileno())
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
                if load(folder).index == index:
                    return
        old = folder.with_name(f"{partial.name}.old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    raise DataError(f"cannot move {partial} to {folder}; stop any other process that writes there")


def _index(told: dict[str, Any], folder: Path) -> Index:
    kinds = {field.name: field.type for field in fields(Index)}
    wrong = next((name for name, kind in kinds.items() if type(told.get(name)) is not kind), "")
    if wrong or (spare := sorted(set(told) - set(kinds))):
        why = f"{wrong!r} is {told.get(wrong)!r:.40}" if wrong else f"it has the unknown field {spare[0]!r:.40}"
        raise DataError(f"{folder / sealed.NAME} is damaged: {why}; {sealed.AGAIN}")
    index = Index(**told)
    if index.dtype not in ("<u2", "<u4") or not 0 < index.num_documents < index.num_tokens:
        numbers = f"{index.num_documents} documents in {index.num_tokens} tokens of type {index.dtype!r:.40}"
        raise DataError(f"{folder / sealed.NAME} is damaged: {numbers}; {sealed.AGAIN}")
    if not all(0 <= token < index.vocab_size for token in (index.end_id, index.pad_id)) or index.num_bytes < 0:
        numbers = f"end {index.end_id}, padding {index.pad_id}, vocabulary {index.vocab_size}, bytes {index.num_bytes}"
        raise DataError(f"{folder / sealed.NAME} is damaged: {numbers}; {sealed.AGAIN}")
    return index


def _check_starts(tokens: Tokens) -> None:
    """Refuse document starts that are not the positions of end-of-text tokens, in order, from first to last."""
    file, index = tokens.folder / "documents.npy", tokens.index
    files.check(file)
    try:
        starts = np.asarray(tokens.starts)
    except Exception as error:  # numpy parses the header as Python: ValueError, SyntaxError, EOFError, …
        raise DataError(f"{file} is damaged: {str(error).splitlines()[0][:100]}; {sealed.AGAIN}") from None
    right = starts.shape == (index.num_documents + 1,) and starts.dtype == np.int64
    right = right and starts[0] == 0 and starts[-1] == index.num_tokens - 1 and bool((np.diff(starts) > 0).all())
    if not right or (tokens._stream[starts] != index.end_id).any():
        raise DataError(f"{file} is damaged: it does not have the starts of {index.num_documents} documents")
