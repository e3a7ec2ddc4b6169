"""Write GGUF files for tests, sound ones and others, without the code under test."""

import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 30}
# number of a block type: numbers in a block, bytes of a block, where its scales of two bytes are
BLOCKS = {
    2: (32, 18, (0,)), 3: (32, 20, (0, 2)), 6: (32, 22, (0,)), 7: (32, 24, (0, 2)), 8: (32, 34, (0,)),
    12: (256, 144, (0, 2)), 13: (256, 176, (0, 2)), 14: (256, 210, (208,)),
}  # fmt: skip


class Typed(NamedTuple):
    """A value of a given type of the metadata; an array has the type of its items too."""

    kind: int
    value: Any
    items: int = 0


class Packed(NamedTuple):
    """A tensor of blocks."""

    kind: int
    shape: tuple[int, ...]
    data: bytes


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> Typed:
    """Return the type that llama.cpp's converter gives a value."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, list):
        return Typed(ARRAY, value, typed(value[0]).kind)
    kinds = {bool: 7, int: 4, float: 6, str: STRING, bytes: STRING}
    return Typed(kinds[type(value)], value)


def value(item: Typed) -> bytes:
    if item.kind == STRING:
        return text(item.value)
    if item.kind == ARRAY:
        head = struct.pack("<IQ", item.items, len(item.value))
        return head + b"".join(
            value(part if isinstance(part, Typed) else Typed(item.items, part)) for part in item.value
        )
    return struct.pack("<" + NUMBERS[item.kind], item.value)


def pair(key: str | bytes, item: Any) -> bytes:
    item = typed(item)
    return text(key) + struct.pack("<I", item.kind) + value(item)


def info(name: str | bytes, kind: int, shape: tuple[int, ...], offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def packed(tensor: Any) -> Packed:
    if isinstance(tensor, Packed):
        return tensor
    return Packed(PLAIN[tensor.dtype], tensor.shape, np.ascontiguousarray(tensor).tobytes())


def gguf(
    metadata: dict[str, Any], tensors: dict[str, Any], *, version: int = 3, alignment: int = 32, order: Any = None
) -> bytes:
    """Return a whole file; `order` lists the names in the order of their data."""
    blocks = {name: packed(tensor) for name, tensor in tensors.items()}
    offsets, data = {}, b""
    for name in order or blocks:
        offsets[name] = len(data)
        data += blocks[name].data + b"\0" * (-len(blocks[name].data) % alignment)
    if alignment != 32:
        metadata = {"general.alignment": alignment, **metadata}
    pairs = [pair(key, item) for key, item in metadata.items()]
    infos = [info(name, block.kind, block.shape, offsets[name]) for name, block in blocks.items()]
    return joined(pairs, infos, data, version=version, alignment=alignment)


def joined(
    pairs: list[bytes], infos: list[bytes], data: bytes = b"", *, version: int = 3, alignment: int = 32
) -> bytes:
    """Put a file together from its parts, which need not fit each other."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


def random_blocks(kind: int, shape: tuple[int, ...], seed: int = 0) -> Packed:
    """Return random bytes with finite scales."""
    size, count, scales = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (int(np.prod(shape)) // size, count), np.uint8)
    for place in scales:
        scale = rng.normal(0, 0.1, len(data)).astype("<f2")
        data[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return Packed(kind, shape, data.tobytes())
