"""Tokenised blocks in ArrayRecord files, which have checksums and can be read in place by many machines.

A folder holds `blocks-*.array_record` and `index.json`, which is sealed (see `data/sealed.py`). A record is the
`length` + 1 token ids of one block (the last may be shorter), uint16 or uint32, little endian; consecutive blocks share
one token.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data import files, sealed
from fm_jax.data.text.layout import Row, shifted
from fm_jax.data.text.tokens import Tokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    files: tuple[str, ...]
    dtype: str
    length: int
    num_records: int
    num_bytes: int  # UTF-8 bytes of the text, for bits per byte
    vocab_size: int
    pad_id: int
    sha256: str  # hash of the token stream


class RecordBlocks:
    """The blocks of `text.Blocks`, read from ArrayRecord; opened by `load`."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self.name = f"blocks of {folder}"
        self.fingerprint = f"blocks-{index.length}-0-{index.sha256[:16]}"  # the same data as `text.Blocks`
        self.limits: Mapping[str, int] = {"tokens": index.vocab_size, "targets": index.vocab_size}

    def __len__(self) -> int:
        return self._index.num_records

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stream = np.frombuffer(self._source[index], self._index.dtype).astype(np.int32)
        if not 2 <= len(stream) <= self._index.length + 1:
            raise DataError(f"the record has {len(stream)} tokens, not 2 to {self._index.length + 1}")
        return shifted(stream, self._index.length, self._index.pad_id)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_source"}

    @property
    def length(self) -> int:
        """Tokens per row, fixed when the records were written."""
        return self._index.length

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text. Bits per byte = nats summed over all targets / ln 2 / num_bytes."""
        return self._index.num_bytes

    @cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            source = ArrayRecordDataSource([str(self._folder / name) for name in self._index.files])
        except Exception as error:  # the reader raises RuntimeError and ValueError, with C++ text
            raise DataError(f"cannot open the records of {self._folder}: {error}") from error
        if len(source) != self._index.num_records:
            raise DataError(f"{self._folder} has {len(source)} records, but index.json lists {self._index.num_records}")
        return source


def write(tokens: Tokens, folder: Path, *, length: int, per_file: int = 1 << 16) -> RecordBlocks:
    """Cut tokens into blocks of `length` and write them as ArrayRecord; `folder` is created atomically."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if folder.exists():
        raise DataError(f"{folder} exists; remove it first")
    partial = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.tmp")
    dtype = np.dtype(tokens.index.dtype)
    count = -(-(len(tokens) - 1) // length)
    names: list[str] = []
    try:
        partial.mkdir(parents=True)
        for first in range(0, count, per_file):
            names.append(f"blocks-{len(names):05d}.array_record")
            writer = ArrayRecordWriter(str(partial / names[-1]), "group_size:1")
            for block in range(first, min(first + per_file, count)):
                writer.write(tokens[block * length : (block + 1) * length + 1].astype(dtype).tobytes())
            writer.close()
        source = tokens.index
        index = Index(
            tuple(names), dtype.str, length, count, source.num_bytes, source.vocab_size, source.pad_id, source.sha256
        )
        sealed.write(partial, asdict(index))
        os.replace(partial, folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: from the writer's C++
        raise files.failed(error, f"cannot write token records to {folder}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load(folder)


def load(folder: Path) -> RecordBlocks:
    """Open blocks written by `write`, or by another tool in the same format.

    Raises:
        DataError: missing files, a damaged index, or another number of records than it lists.
    """
    told, digests = sealed.read(folder, "token records")
    index = _index(told, folder)
    for name in index.files:
        if not os.path.lexists(folder / name):
            raise DataError(f"{folder} is missing {name}")
        files.check(folder / name)
    if digests is None:
        _log.warning("%s was written without a seal: its numbers cannot be verified; write it again to seal it", folder)
    blocks = RecordBlocks(folder, index)
    _ = blocks._source
    return blocks


def _index(told: dict[str, Any], folder: Path) -> Index:
    numbers = ("length", "num_records", "num_bytes", "vocab_size", "pad_id")
    names = told.get("files")
    right = set(told) == {field.name for field in fields(Index)} and isinstance(names, list)
    right = right and all(type(told[name]) is int and told[name] >= 0 for name in numbers)
    right = right and told["length"] > 0 and told["dtype"] in ("<u2", "<u4") and isinstance(told["sha256"], str)
    if not right or not all(isinstance(name, str) and Path(name).name == name for name in names or ()):
        raise DataError(f"{folder / sealed.NAME} is damaged: it is not an index of token records; {sealed.AGAIN}")
    return Index(**told | {"files": tuple(told["files"])})
