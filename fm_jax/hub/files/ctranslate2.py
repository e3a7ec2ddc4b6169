"""Read the binary format of CTranslate2, version 6: a header, then each variable's name, shape, type and bytes.

Little-endian throughout: u32 version, u16 length and name of the model's spec, u32 revision, u32 number of variables;
for each u16 length and name (both names end with a zero byte), u8 rank, u32 per dimension, u8 type, u32 bytes, data;
at last u32 number of aliases, and for each two names.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files.tensor_file import Place, TensorFile
from fm_jax.hub.files.weights import Spec

VERSION = 6
DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
_NAME = re.compile(r"(?!.*\.\.)[\w.\-/]{1,512}", re.ASCII)
_MAX_VARIABLES, _MAX_RANK = 100_000, 8


@dataclass(frozen=True)
class Model:
    """An open file."""

    spec: str  # such as WhisperSpec
    revision: int
    tensors: TensorFile
    aliases: dict[str, str]  # another name of a variable -> the variable


def open_file(path: str | Path) -> Model:
    """Check a file's structure against the file, and return its variables, unread.

    Raises:
        CheckpointError: not such a file, another version, damaged, or longer than what it describes.
    """
    headers: list[tuple[str, int, dict[str, str]]] = []

    def find(where: str, file: BinaryIO) -> dict[str, Place]:
        spec, revision, places, aliases = _Reader(where, file).model()
        headers.append((spec, revision, aliases))
        return places

    tensors = TensorFile.open(path, find)
    spec, revision, aliases = headers[0]
    return Model(spec, revision, tensors, aliases)


class _Reader:
    """Reads a file's structure front to back; whatever it reads lies within the file."""

    def __init__(self, where: str, file: BinaryIO) -> None:
        self._where, self._file, self._at = where, file, 0
        self._size = os.fstat(file.fileno()).st_size

    def model(self) -> tuple[str, int, dict[str, Place], dict[str, str]]:
        """Return spec, revision, variables and aliases."""
        if (version := self._number(4)) != VERSION:
            raise CheckpointError(
                f"{self._where} is not a CTranslate2 model of version {VERSION} (its first number is {version})"
            )
        spec, revision, places = self._name("the spec"), self._number(4), dict[str, Place]()
        for _ in range(self._count("variables")):
            name = self._name("a variable")
            if name in places:
                raise self._bad(f"{name} is there twice")
            places[name] = self._place(name)
        aliases: dict[str, str] = {}
        for _ in range(self._count("aliases")):
            alias, name = self._name("an alias"), self._name("an alias")
            if alias in places or alias in aliases or name not in places:
                raise self._bad(f"the alias {alias} of {name} is there already, or stands for nothing")
            aliases[alias] = name
        if self._at != self._size:
            raise self._bad(f"it ends at byte {self._at} of {self._size}")
        return spec, revision, places, aliases

    def _place(self, name: str) -> Place:
        rank = self._number(1)
        if rank > _MAX_RANK:
            raise self._bad(f"{name} has {rank} dimensions; at most {_MAX_RANK} are supported")
        shape = tuple(self._number(4) for _ in range(rank))
        kind, count = self._number(1), self._number(4)
        if kind >= len(DTYPES):
            raise self._bad(f"{name} has the unknown type {kind}")
        # two bytes of bfloat16, which numpy knows only with ml_dtypes
        width = 2 if DTYPES[kind] == "bfloat16" else np.dtype(DTYPES[kind]).itemsize
        if math.prod(shape) * width != count:
            raise self._bad(f"{name} has {count} bytes, its shape {list(shape)} of {DTYPES[kind]} needs another number")
        if count > self._size - self._at:
            raise self._bad(f"{name} ends after the file")
        start = self._at
        self._at += count
        self._file.seek(self._at)
        return Place(Spec(DTYPES[kind], shape), ((start, count),))

    def _count(self, what: str) -> int:
        if (count := self._number(4)) > _MAX_VARIABLES:
            raise self._bad(f"it says it has {count} {what}; at most {_MAX_VARIABLES} are supported")
        return count

    def _name(self, what: str) -> str:
        raw = self._bytes(self._number(2))
        name = raw.removesuffix(b"\0").decode("ascii", "replace")
        if not raw.endswith(b"\0") or not _NAME.fullmatch(name):
            raise self._bad(f"the name of {what} is {name[:60]!a}")
        return name

    def _number(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "little")

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._bad(f"it is cut short at byte {self._at}")
        self._at += count
        return self._file.read(count)

    def _bad(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._where} is damaged or not a CTranslate2 model: {problem}; take a fresh copy")
