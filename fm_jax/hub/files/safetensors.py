"""Read and write the safetensors format: eight bytes of length, a JSON header, then the tensors' bytes.

The safetensors library accepts malformed files (two tensors of one name, names that leave a folder, a header that takes
20 s to parse) and silently writes arrays that are not contiguous wrongly. So the format, which is small, is written
out here.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.errors import CheckpointError, ResourceError
from fm_jax.hub.files.tensor_file import Place, TensorFile
from fm_jax.hub.files.weights import Spec

MAX_HEADER = 16_000_000  # bytes
MAX_TENSORS = 100_000
NAME = re.compile(r"(?!.*\.\.)[\w.\-/:]{1,512}", re.ASCII)
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
"""The format's dtype name -> numpy's."""

_WORDS = {ours: theirs for theirs, ours in DTYPES.items()}
_FORMAT = MappingProxyType({"format": "pt"})


def open_file(path: str | Path, *, allow_nonfinite: bool = False) -> TensorFile:
    """Check a file's header against the file, and return its tensors, unread.

    Args:
        path: path of a .safetensors file.
        allow_nonfinite: allow infinities and NaNs; otherwise reading a tensor that holds one is an error.

    Raises:
        CheckpointError: the header is malformed; the message names the first problem.
    """
    return TensorFile.open(path, _places, allow_nonfinite=allow_nonfinite)


def write(
    folder: str | Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] = _FORMAT,
) -> None:
    """Write tensors one at a time to one file, or to shards and their index, with the file names of `transformers`.

    The files are flushed to disk when this returns; they are deleted if it raises. To never expose incomplete files,
    write into a new folder and rename it at the end.

    Args:
        folder: an existing folder.
        specs: {name: dtype and shape} of all tensors; they decide which shard holds which tensor.
        tensors: (name, array), each name once, in any order; an array need not be contiguous.
        shard_bytes: largest size of a shard, unless a single tensor is larger.
        metadata: metadata of every file's header.

    Raises:
        ValueError: a tensor is not in `specs`, has another dtype or shape there, or was not given.
        ResourceError: the disk has too little free space.
    """
    folder = Path(folder)
    shards = list(_shards(specs, shard_bytes))
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    where: dict[str, tuple[Path, int]] = {}
    made: list[Path] = []
    total = sum(map(_size, specs.values()))
    if (free := shutil.disk_usage(folder).free) < total:
        raise ResourceError(f"no space for {total / 1e9:.3g} GB of weights in {folder}; {free / 1e9:.3g} GB are free")
    index = folder / "model.safetensors.index.json"
    try:
        for file, shard in zip(files, shards, strict=True):
            head, offsets = _head(shard, metadata)
            with file.open("xb") as out:
                made.append(file)
                out.write(head)
                out.truncate(len(head) + sum(map(_size, shard.values())))
            where |= {name: (file, len(head) + offset) for name, offset in offsets.items()}
        _fill(specs, where, tensors)
        if count > 1:
            data = {
                "metadata": {"total_size": total},
                "weight_map": {name: file.name for name, (file, _) in where.items()},
            }
            with index.open("x", encoding="utf-8") as text:
                made.append(index)
                text.write(json.dumps(data, indent=2, sort_keys=True) + "\n")
        for path in (*made, folder):
            _sync(path)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _fill(specs: Mapping[str, Spec], where: Mapping[str, tuple[Path, int]], tensors: Iterable[Any]) -> None:
    """Write every tensor at its offset."""
    left = set(specs)
    for name, array in tensors:
        if name not in left:
            raise ValueError(f"{name} was given twice" if name in specs else f"{name} is not in the specs")
        if (spec := Spec(array.dtype.name, array.shape)) != specs[name]:
            raise ValueError(f"{name} is {spec}, the specs have {specs[name]}")
        left.discard(name)
        file, start = where[name]
        with file.open("r+b") as out:
            out.seek(start)
            # the bytes in memory are in the file's order only if the array is row-major
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if left:
        raise ValueError(f"{len(left)} tensors were not given: {', '.join(sorted(left)[:10])}")


def _shards(specs: Mapping[str, Spec], shard_bytes: int) -> Iterator[dict[str, Spec]]:
    """Yield the tensors of each file, in order; a new file starts when the next tensor does not fit."""
    shard, size = dict[str, Spec](), 0
    for name, spec in specs.items():
        if shard and size + _size(spec) > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += _size(spec)
    yield shard


def _head(shard: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return length and header of a file, and the offset of each tensor after them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in sorted(shard.items(), key=lambda pair: -np.dtype(pair[1].dtype).itemsize):  # keeps each aligned
        if spec.dtype not in _WORDS or not NAME.fullmatch(name):
            raise ValueError(f"{name!r}: this name or its dtype {spec.dtype} could not be read again")
        offsets[name], end = end, end + _size(spec)
        header[name] = {"dtype": _WORDS[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _places(where: str, file: BinaryIO) -> dict[str, Place]:
    """Read and check the header."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length < 2 or length > size - 8:
        raise CheckpointError(f"{where} is not a safetensors file, or is cut short ({size} bytes); take a fresh copy")
    if length > MAX_HEADER:
        raise CheckpointError(f"{where} has a header of {length} bytes; at most {MAX_HEADER} are supported")
    header = json_file.parse(file.read(length), f"{where} has an invalid header, which", CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{where} has a header that is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise CheckpointError(f"{where} has metadata that are not strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{where} has {len(header)} tensors; at most {MAX_TENSORS} are supported")
    places = {name: _entry(where, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, ((start, count),)) in sorted(places.items(), key=lambda pair: pair[1].runs):
        if start != end:
            raise CheckpointError(
                f"{where}: {name} begins at byte {start} of the data, the tensor before ends at {end}"
            )
        end = start + count
    if end != size - 8 - length:
        raise CheckpointError(
            f"{where}: the header describes {end} bytes of data, the file has {size - 8 - length}; take a fresh copy"
        )
    return {name: Place(spec, ((start + 8 + length, count),)) for name, (spec, ((start, count),)) in places.items()}


def _entry(where: str, name: str, entry: Any) -> Place:
    """Check the entry of one tensor; its offset is relative to the end of the header."""

    def bad(problem: str) -> CheckpointError:
        return CheckpointError(f"{where}: tensor {name[:120]!r} {problem}")

    if not NAME.fullmatch(name):
        raise bad("has an invalid name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"has dtype {str(dtype)[:40]!r}; supported are {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 32 or math.prod(size or 1 for size in shape) >= 1 << 60:
        raise bad(f"has the invalid shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] >= 1 << 63:
        raise bad(f"has the invalid offsets {str(offsets)[:80]}")
    spec = Spec(DTYPES[dtype], tuple(shape))
    if _size(spec) != offsets[1] - offsets[0]:
        raise bad(f"needs {_size(spec)} bytes for {dtype} {shape} but has {offsets[1] - offsets[0]}")
    return Place(spec, ((offsets[0], _size(spec)),))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
