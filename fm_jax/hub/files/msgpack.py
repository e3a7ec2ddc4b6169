"""Read weights of the Flax classes that `transformers` had until version 5, under the names of its torch classes.

A flax_model.msgpack is a tree of MessagePack maps with arrays at its leaves. Only maps, names and arrays of plain
numbers are supported; the positions of the numbers are recorded, so that arrays can be read in parts.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files.safetensors import DTYPES, MAX_TENSORS, NAME
from fm_jax.hub.files.tensor_file import Place, TensorFile
from fm_jax.hub.files.weights import Index, Spec

MAX_DEPTH = 64
_ARRAY, _SCALAR = 1, 3  # flax's extension types; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"  # flax splits arrays above 1 GiB
_WEIGHTS = ("kernel", "embedding", "scale")
_SIZED = {0xC4: "bytes", 0xC7: "extension", 0xCC: "number", 0xD9: "text", 0xDC: "list", 0xDE: "map"}


class FlaxFile:
    """Tensors of one file with torch's names and layouts; implements `weights.Weights`."""

    def __init__(self, file: TensorFile) -> None:
        """Rename the tensors of a file whose names are paths in a Flax tree."""
        self._file, self.where = file, file.where
        self._stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.specs: dict[str, Spec] = {}
        for path, (dtype, shape) in file.specs.items():
            name, axes = torch_name(path), _axes(path, len(shape))
            if name in self.specs:
                raise CheckpointError(f"{self.where}: {self._stored[name][0]} and {path} are both {name} in torch")
            self._stored[name], self.specs[name] = (path, axes), Spec(dtype, tuple(shape[axis] for axis in axes))

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of a tensor, one slice an axis of its torch layout."""
        path, axes = self._stored[name]
        tensor = self._file.read(path, tuple(index[axis] for axis in np.argsort(axes))).transpose(axes)
        if out is None:
            return tensor
        out[...] = tensor
        return out


def open_file(path: str | Path, *, allow_nonfinite: bool = False) -> FlaxFile:
    """Check a whole file and return its tensors, unread.

    Args:
        path: path of a .msgpack file.
        allow_nonfinite: allow infinities and NaNs; otherwise reading a tensor that holds one is an error.

    Raises:
        CheckpointError: the file holds anything except maps of names and arrays of plain numbers, or is damaged.
    """
    return FlaxFile(TensorFile.open(path, _places, allow_nonfinite=allow_nonfinite))


def torch_name(path: str) -> str:
    """Return the torch class's name of a path in a Flax tree, such as bert/pooler/dense/kernel."""
    parts = path.split("/")
    moving = parts[0] == "batch_stats"
    if parts[0] in ("params", "batch_stats"):
        parts = parts[1:]
    if parts[-1:] and parts[-1] in _WEIGHTS:
        parts[-1] = "weight"
    elif moving:
        parts[-1] = f"running_{parts[-1]}"
    return ".".join(parts)


def _axes(path: str, rank: int) -> tuple[int, ...]:
    """Return the axes of a Flax array in the order of torch's layout.

    Dense [in, out] and a convolution over time [W, in, out] are reversed, one over a plane [H, W, in, out] becomes
    [out, in, H, W]. GPT-2's Conv1D has (out, in) in Flax and (in, out) in torch, so it is reversed too.
    """
    if not path.endswith("kernel"):
        return tuple(range(rank))
    return (3, 2, 0, 1) if rank == 4 else tuple(reversed(range(rank)))


class _Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    run: tuple[int, int]


class _Cursor:
    """Walks through a file; reads every byte except the numbers, and refuses lengths beyond the end of the file."""

    def __init__(self, where: str, file: BinaryIO) -> None:
        self.where, self.file, self.at, self.left = where, file, 0, MAX_TENSORS
        self.size = os.fstat(file.fileno()).st_size

    def tree(self) -> dict[str, Any]:
        """Return {name: subtree, array, number or True} for the whole file."""
        kind, count = self.head()
        if kind != "map":
            raise self.bad(f"holds a {kind}, not a map of names")
        root = self.branch(count, 1)
        if self.at != self.size:
            raise self.bad(f"has {self.size - self.at} extra bytes at its end")
        return root

    def branch(self, count: int, depth: int) -> dict[str, Any]:
        if depth > MAX_DEPTH:
            raise self.bad(f"is nested deeper than {MAX_DEPTH} levels")
        nodes: dict[str, Any] = {}
        for _ in range(count):
            self.left -= 1
            if self.left < 0:
                raise self.bad(f"holds more than {MAX_TENSORS} names")
            name = self.text()
            if name in nodes:
                raise self.bad(f"holds {name[:80]!r} twice in one map")
            kind, value = self.head()
            if kind == "map":
                nodes[name] = self.branch(value, depth + 1)
            elif kind == "extension":
                nodes[name] = self.array(name, value)
            elif kind in ("number", "true"):  # parts of a chunked array
                nodes[name] = value if kind == "number" else True
            else:
                raise self.bad(f"holds a {kind} as {name[:80]!r}, not an array")
        return nodes

    def array(self, name: str, size: int) -> _Array:
        """Read the shape and dtype that flax stored of an array, and skip its numbers."""
        code = self.take(1)[0]
        end = self.at + size
        if code not in (_ARRAY, _SCALAR) or self.head() != ("list", 3):
            raise self.bad(f"holds extension {code} as {name[:80]!r}, not an array of plain numbers")
        kind, rank = self.head()
        if kind != "list" or rank > 32:
            raise self.bad(f"has a shape for {name[:80]!r} that is not a list")
        shape = tuple(self.natural() for _ in range(rank))
        dtype = self.text()
        kind, count = self.head()
        if dtype not in DTYPES.values():
            raise self.bad(f"has dtype {dtype[:40]!r} for {name[:80]!r}, not one of {', '.join(DTYPES.values())}")
        if kind != "bytes" or count != math.prod(shape) * np.dtype(dtype).itemsize or self.at + count != end:
            raise self.bad(f"has {count} bytes for {name[:80]!r}, which do not fit {dtype} {list(shape)}")
        if end > self.size:
            raise self.bad("is cut short; take a fresh copy")
        array = _Array(dtype, shape, (self.at, count))
        self.at = end
        self.file.seek(end)
        return array

    def text(self) -> str:
        kind, count = self.head()
        if kind not in ("text", "bytes") or count > 512:
            raise self.bad(f"holds a {kind} of length {count} instead of a name")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise self.bad("holds a name that is not UTF-8 text") from None

    def natural(self) -> int:
        kind, value = self.head()
        if kind != "number" or value >= 1 << 40:
            raise self.bad("holds a size that is not a number")
        return value

    def head(self) -> tuple[str, int]:
        """Read the head of the next value: its kind, and its length or (of a number) its value."""
        byte = self.take(1)[0]
        for below, kind, bits in ((0x80, "number", 0x7F), (0x90, "map", 15), (0xA0, "list", 15), (0xC0, "text", 31)):
            if byte < below:
                return kind, byte & bits
        if byte == 0xC3:
            return "true", 1
        if 0xD4 <= byte <= 0xD8:
            return "extension", 1 << (byte - 0xD4)
        for first, kind in _SIZED.items():
            wide = byte - first + (kind in ("list", "map"))  # their lengths start at two bytes, others at one
            if first <= byte <= {"number": 0xCF, "list": 0xDD, "map": 0xDF}.get(kind, first + 2):
                return kind, int.from_bytes(self.take(1 << wide), "big")
        return f"value of kind {byte:#x}", 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.bad("is cut short; take a fresh copy")
        self.at += count
        return data

    def bad(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {problem}")


def _places(where: str, file: BinaryIO) -> dict[str, Place]:
    return dict(_flat(_Cursor(where, file).tree(), where))


def _flat(node: dict[str, Any], where: str, path: str = "") -> Iterator[tuple[str, Place]]:
    """Yield (path, place) of every array."""
    if _CHUNKED in node:
        yield path, _joined(node, where, path)
        return
    for name, value in node.items():
        inner = f"{path}/{name}" if path else name
        if isinstance(value, dict):
            yield from _flat(value, where, inner)
        elif isinstance(value, _Array):
            if not NAME.fullmatch(inner):
                raise CheckpointError(f"{where}: {inner[:120]!r} is not a valid tensor name")
            yield inner, Place(Spec(value.dtype, value.shape), (value.run,))
        else:
            raise CheckpointError(f"{where} holds a number as {inner[:120]!r}, not an array")


def _joined(node: dict[str, Any], where: str, path: str) -> Place:
    """Return the place of an array that flax wrote in chunks."""
    shape, chunks = (_ordered(node.get(name)) for name in ("shape", "chunks"))
    if not NAME.fullmatch(path) or shape is None or not chunks or not all(type(size) is int for size in shape):
        raise CheckpointError(f"{where}: the chunks of {path[:120]!r} are not in flax's format")
    if not all(isinstance(chunk, _Array) and chunk.dtype == chunks[0].dtype for chunk in chunks):
        raise CheckpointError(f"{where}: the chunks of {path} have different dtypes")
    spec = Spec(chunks[0].dtype, tuple(shape))
    if sum(chunk.run[1] for chunk in chunks) != math.prod(shape) * np.dtype(spec.dtype).itemsize:
        raise CheckpointError(f"{where}: the chunks of {path} do not add up to shape {list(shape)}")
    return Place(spec, tuple(chunk.run for chunk in chunks))


def _ordered(node: Any) -> list[Any] | None:
    """Return the values of {"0": …, "1": …}, or None for anything else."""
    if not isinstance(node, dict) or node.keys() != {str(number) for number in range(len(node))}:
        return None
    return [node[str(number)] for number in range(len(node))]
