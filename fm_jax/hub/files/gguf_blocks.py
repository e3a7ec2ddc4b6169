"""Decode the blocks of GGUF's quantised tensors: a few bytes hold 32 or 256 numbers of one row, and their scales.

Formats and the order of operations are those of ggml, so the decoded float32 numbers are those of its Python package to
the last bit. Letters: d scale, m minimum, q small integers, s scales and minima of 6 bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Decode = Callable[[np.ndarray, np.ndarray], None]
"""(blocks [..., B], out [..., B, size] float32): fill `out`."""


class Kind(NamedTuple):
    """How the numbers of a tensor are stored."""

    name: str
    dtype: str  # of the decoded numbers
    size: int = 1  # numbers in a block; 1: plain numbers
    block: np.dtype = np.dtype("u1")  # fields of a block
    decode: Decode | None = None

    @property
    def bytes(self) -> int:
        """Return the bytes of a block, or of a plain number."""
        return self.block.itemsize if self.decode else np.dtype(self.dtype).itemsize


def _scale(field: np.ndarray) -> np.ndarray:
    """Return scales [..., B] of two bytes as float32 [..., B, 1]."""
    return field.astype(np.float32)[..., None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Return the low halves of the bytes [..., N], then the high halves: [..., 2 N]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    """Return numbers of five bits: four in `q`, and bit i of `high` is the fifth of number i."""
    high = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    return _nibbles(blocks["q"]) | high << 4


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.subtract(_nibbles(blocks["q"]), np.float32(8), out=out)
    out *= _scale(blocks["d"])


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(blocks["q"]), _scale(blocks["d"]), out=out)
    out += _scale(blocks["m"])


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.subtract(_five_bits(blocks), np.float32(16), out=out)
    out *= _scale(blocks["d"])


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_five_bits(blocks), _scale(blocks["d"]), out=out)
    out += _scale(blocks["m"])


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks["q"], _scale(blocks["d"]), out=out)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and the minima [..., B, 8] of the eight groups of a block.

    Groups 0 to 3 have the low six bits of bytes 0 to 3 and 4 to 7. Groups 4 to 7 have the nibbles of bytes 8 to 11,
    and their upper two bits are the upper two of bytes 0 to 7.
    """
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minima


def _grouped(blocks: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with d·s·q - m·s of eight groups: q [..., B, 8, 32]."""
    scales, minima = _six_bits(blocks["s"])
    groups = out.reshape(q.shape)
    np.multiply(q, (_scale(blocks["d"]) * scales)[..., None], out=groups)
    groups -= (_scale(blocks["m"]) * minima)[..., None]


def _pairs(packed: np.ndarray) -> np.ndarray:
    """Return numbers of four bits in groups of 32, [..., B, 8, 32]: 32 bytes hold one group low and the next high."""
    halves = packed.reshape(*packed.shape[:-1], 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    return halves.reshape(*packed.shape[:-1], 8, 32)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _grouped(blocks, _pairs(blocks["q"]), out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    high = blocks["high"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit g of byte i: number 32 g + i
    _grouped(blocks, _pairs(blocks["q"]) | high << 4, out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Decode two halves of 128 numbers: four bits of number 64 i + j, two of number 32 i + j, then 16 to a scale."""
    shape = blocks.shape
    low = blocks["q"].reshape(*shape, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = blocks["high"].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = low.reshape(*shape, 16, 16) | high.reshape(*shape, 16, 16) << 4
    groups = out.reshape(q.shape)
    np.subtract(q, np.float32(32), out=groups)
    groups *= (_scale(blocks["d"]) * blocks["s"])[..., None]


def _fields(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype:
    return np.dtype([*fields])


_D, _M, _S = ("d", "<f2"), ("m", "<f2"), ("s", "u1", 12)

KINDS = {
    0: Kind("F32", "float32"),
    1: Kind("F16", "float16"),
    2: Kind("Q4_0", "float32", 32, _fields(_D, ("q", "u1", 16)), _q4_0),
    3: Kind("Q4_1", "float32", 32, _fields(_D, _M, ("q", "u1", 16)), _q4_1),
    6: Kind("Q5_0", "float32", 32, _fields(_D, ("high", "u1", 4), ("q", "u1", 16)), _q5_0),
    7: Kind("Q5_1", "float32", 32, _fields(_D, _M, ("high", "u1", 4), ("q", "u1", 16)), _q5_1),
    8: Kind("Q8_0", "float32", 32, _fields(_D, ("q", "i1", 32)), _q8_0),
    12: Kind("Q4_K", "float32", 256, _fields(_D, _M, _S, ("q", "u1", 128)), _q4_k),
    13: Kind("Q5_K", "float32", 256, _fields(_D, _M, _S, ("high", "u1", 32), ("q", "u1", 128)), _q5_k),
    14: Kind("Q6_K", "float32", 256, _fields(("q", "u1", 128), ("high", "u1", 64), ("s", "i1", 16), _D), _q6_k),
    30: Kind("BF16", "bfloat16"),
}
"""The format's number of a block type -> how it is stored."""

OTHERS = {
    4: "Q4_2, removed", 5: "Q4_3, removed", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4, removed", 32: "Q4_0_4_8, removed", 33: "Q4_0_8_8, removed",
    34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4, removed", 37: "IQ4_NL_4_8, removed", 38: "IQ4_NL_8_8, removed",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Names of the types that are not read, for messages."""


def decode(kind: Kind, packed: np.ndarray, out: np.ndarray) -> None:
    """Fill float32 rows [..., B * size] with the numbers of packed rows [..., B * bytes] of bytes."""
    if kind.decode is None:
        raise ValueError(f"{kind.name} is not packed in blocks")
    blocks = packed.view(kind.block)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale: the reader looks for what is not finite
        kind.decode(blocks, out.reshape(*blocks.shape, kind.size))
