"""Read GGUF, the format of llama.cpp and the local-model tools: metadata of any kind, then tensors, often quantised.

A file is: "GGUF", version, two counts, the metadata (key, type, value), the tensors' names, shapes, block types and
offsets, and the data. Everything is little-endian. Quantised tensors are decoded when they are read, and only the rows
that are asked for, so that the model is never in memory twice. Names, values and layouts are the file's own;
`hub/gguf_model.py` translates them.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files.fill import aligned
from fm_jax.hub.files.gguf_blocks import KINDS, OTHERS, Kind, decode
from fm_jax.hub.files.safetensors import MAX_TENSORS, NAME
from fm_jax.hub.files.tensor_file import Place, TensorFile, check_finite
from fm_jax.hub.files.weights import Index, Spec

SUFFIX = ".gguf"
MAGIC = b"GGUF"
MAX_METADATA = 64_000_000  # bytes; the largest vocabularies, of 262,144 tokens and their merges, take some 20 million
MAX_KEYS = 10_000
MAX_ITEMS = 2_000_000  # of all arrays together
MAX_KEY = 1024  # bytes
MAX_DEPTH = 4  # of arrays in arrays
_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_QUANTISATION = 2  # version of ggml's block formats


class _Header(NamedTuple):
    metadata: dict[str, Any]
    kinds: dict[str, Kind]  # of each tensor
    specs: dict[str, Spec]  # of the decoded tensors
    places: dict[str, Place]  # of the stored bytes


class GGUFFile:
    """Tensors of one file under its own names; implements `weights.Weights`."""

    def __init__(self, file: TensorFile, header: _Header, *, allow_nonfinite: bool = False) -> None:
        """Decode the packed tensors of a file of bytes."""
        self._file, self._kinds, self._any = file, header.kinds, allow_nonfinite
        self.where, self.specs = file.where, header.specs
        self.metadata: Mapping[str, Any] = header.metadata
        """{key: int, float, bool, str, list of str, or array of numbers}."""

    def kind(self, name: str) -> str:
        """Return the block type of a tensor, such as "Q4_K"."""
        return self._kinds[name].name

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of a tensor, one slice an axis; only its rows, and in them only the blocks, are decoded.

        Raises:
            CheckpointError: the part holds an infinity or a NaN, or the file could not be read.
        """
        kind = self._kinds[name]
        if kind.decode is None:
            return self._file.read(name, index, out)
        columns = range(*index[-1].indices(self.specs[name].shape[-1]))
        first, last = columns.start // kind.size, -(-columns.stop // kind.size)  # blocks
        packed = self._file.read(name, (*index[:-1], slice(first * kind.bytes, last * kind.bytes)))
        rows, width = packed.shape[:-1], (last - first) * kind.size
        whole = len(columns) == width
        decoded = out if out is not None and whole else aligned((*rows, width), np.dtype(kind.dtype))
        decode(kind, packed, decoded)
        part = decoded[..., columns.start - first * kind.size :][..., : len(columns)]
        if not self._any:
            check_finite(self.where, name, part)
        if out is None:
            return part
        if not whole:
            out[...] = part
        return out


def open_file(path: str | Path, *, allow_nonfinite: bool = False) -> GGUFFile:
    """Check a file's metadata and tensor list against the file, and return its tensors, unread.

    Args:
        path: path of a .gguf file.
        allow_nonfinite: allow infinities and NaNs; otherwise reading a tensor that holds one is an error.

    Raises:
        CheckpointError: the file is malformed, cut short, of another version or byte order, or has a block type that
            is not supported; the message names the first problem.
    """
    headers: list[_Header] = []

    def find(where: str, file: BinaryIO) -> dict[str, Place]:
        headers.append(_header(_Cursor(where, file)))
        return headers[0].places

    file = TensorFile.open(path, find, allow_nonfinite=allow_nonfinite)
    return GGUFFile(file, headers[0], allow_nonfinite=allow_nonfinite)


def is_gguf(path: str | Path) -> bool:
    """Say whether a path is a file that begins as GGUF does, whatever its name, or is named as one."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class _Cursor:
    """Reads values in turn; every length is checked against the file and the limits before memory is taken for it."""

    def __init__(self, where: str, file: BinaryIO) -> None:
        self.where, self.file = where, file
        self.size = os.fstat(file.fileno()).st_size
        self.at, self.items = 0, 0

    def take(self, count: int) -> bytes:
        if self.at + count > MAX_METADATA and self.at + count <= self.size:
            raise self.bad(f"has more than {MAX_METADATA} bytes before its tensors; at most that many are supported")
        data = self.file.read(count) if self.at + count <= self.size else b""
        if len(data) != count:
            raise self.bad(f"is cut short ({self.size} bytes); take a fresh copy")
        self.at += count
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, what: str, limit: int = MAX_METADATA) -> str:
        if (length := self.u64()) > limit:
            raise self.bad(f"has {what} of {length} bytes; at most {limit} are supported")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.bad(f"has {what} that is not UTF-8 text") from None

    def value(self, key: str, kind: int, depth: int = 0) -> Any:
        """Read a value of a type of the metadata."""
        if kind == _STRING:
            return self.text(f"a text in {key!r}")
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        if kind not in _NUMBERS:
            raise self.bad(f"has a value of the unknown type {kind} in {key!r}")
        (number,) = self.numbers(key, kind, 1)
        if kind == _BOOL:
            return bool(number)
        # the shortest decimal number that is rounded to it, as the model's own config has it: 1e-05, not 9.99999974e-06
        return float(str(number)) if number.dtype.kind == "f" else int(number)

    def array(self, key: str, depth: int) -> Any:
        """Read an array: numbers as a NumPy array, texts and arrays as a list."""
        if depth > MAX_DEPTH:
            raise self.bad(f"has arrays in {key!r} nested deeper than {MAX_DEPTH} levels")
        kind, count = self.u32(), self.u64()
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.bad(f"has an array of {count} items in {key!r}; at most {MAX_ITEMS} in all are supported")
        if kind in _NUMBERS:
            return self.numbers(key, kind, count)
        return [self.value(key, kind, depth) for _ in range(count)]

    def numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        numbers = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _BOOL and numbers.size and numbers.max() > 1:
            raise self.bad(f"has a truth value in {key!r} that is neither 0 nor 1")
        return numbers

    def bad(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {problem}")


def _header(cursor: _Cursor) -> _Header:
    """Read and check everything before the data."""
    tensors, keys = _start(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text("a key", MAX_KEY)
        if not (key.isascii() and key.isprintable()) or not key:
            raise cursor.bad(f"has the invalid key {key[:80]!r}")
        if key in metadata:
            raise cursor.bad(f"has the key {key[:80]!r} twice")
        metadata[key] = cursor.value(key[:80], cursor.u32())
    kinds, specs, offsets = {}, dict[str, Spec](), dict[str, int]()
    for _ in range(tensors):
        name, kind, spec, offset = _entry(cursor)
        if name in specs:
            raise cursor.bad(f"has the tensor {name} twice")
        kinds[name], specs[name], offsets[name] = kind, spec, offset
    version = metadata.get("general.quantization_version", _QUANTISATION)
    if (type(version) is not int or version != _QUANTISATION) and any(kind.decode for kind in kinds.values()):
        raise cursor.bad(f"has blocks of version {str(version)[:20]}; only version {_QUANTISATION} is supported")
    places = _places(cursor, _alignment(cursor, metadata), kinds, specs, offsets)
    return _Header(metadata, kinds, specs, places)


def _start(cursor: _Cursor) -> tuple[int, int]:
    """Read the first 24 bytes; return the numbers of tensors and of keys."""
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise cursor.bad(f"is not a GGUF file, or is cut short ({cursor.size} bytes); take a fresh copy")
    version = cursor.u32()
    if not version & 0xFFFF:
        raise cursor.bad("is big-endian; convert it with llama.cpp's gguf_convert_endian.py")
    if version not in (2, 3):
        raise cursor.bad(f"is GGUF version {version}; supported are 2 and 3: convert the model anew with llama.cpp")
    tensors, keys = cursor.u64(), cursor.u64()
    for count, limit, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if count > limit:
            raise cursor.bad(f"has {count} {what}; at most {limit} are supported")
    return tensors, keys


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.bad(f"has general.alignment {str(alignment)[:20]!r}, which is not a power of two")
    return alignment


def _entry(cursor: _Cursor) -> tuple[str, Kind, Spec, int]:
    """Read the name, block type, shape and offset of one tensor."""
    name = cursor.text("a tensor name", 512)
    if not NAME.fullmatch(name):
        raise cursor.bad(f"has a tensor with the invalid name {name[:120]!r}")
    if (rank := cursor.u32()) > 4:
        raise cursor.bad(f"has tensor {name} with {rank} axes; at most 4 are supported")
    # the file counts axes from the fastest, so that rows come last
    shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))[::-1]
    number, offset = cursor.u32(), cursor.u64()
    if number not in KINDS:
        what = OTHERS.get(number, "unknown")
        known = ", ".join(kind.name for kind in KINDS.values())
        raise cursor.bad(f"has tensor {name} of block type {number} ({what}), which is not supported: only {known} are")
    kind = KINDS[number]
    if not all(shape) or math.prod(shape) >= 1 << 60:
        raise cursor.bad(f"has tensor {name} with the invalid shape {list(shape)}")
    if kind.decode and (not shape or shape[-1] % kind.size):
        rows = f"rows of {shape[-1] if shape else 0} numbers"
        raise cursor.bad(f"has tensor {name} with {rows}, not a multiple of the {kind.size} in a block of {kind.name}")
    return name, kind, Spec(kind.dtype, shape), offset


def _places(
    cursor: _Cursor, alignment: int, kinds: Mapping[str, Kind], specs: Mapping[str, Spec], offsets: Mapping[str, int]
) -> dict[str, Place]:
    """Return where each tensor is; refuse overlaps, holes wider than the alignment, and what the file has not got."""
    start = -(-cursor.at // alignment) * alignment
    places, end = {}, 0
    for name in sorted(offsets, key=lambda name: offsets[name]):
        kind, shape, offset = kinds[name], specs[name].shape, offsets[name]
        size = math.prod(shape) // kind.size * kind.bytes
        if offset % alignment:
            raise cursor.bad(f"has tensor {name} at byte {offset} of the data, not a multiple of {alignment}")
        if offset != -(-end // alignment) * alignment:
            raise cursor.bad(f"has tensor {name} at byte {offset} of the data, the tensor before ends at {end}")
        end = offset + size
        stored = Spec("uint8", (*shape[:-1], shape[-1] // kind.size * kind.bytes)) if kind.decode else specs[name]
        places[name] = Place(stored, ((start + offset, size),))
    there = max(0, cursor.size - start)
    if not end <= there < end + alignment:
        raise cursor.bad(f"describes {end} bytes of data and has {there}; take a fresh copy")
    return places
