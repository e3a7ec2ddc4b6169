"""Read JSON that may come from anywhere: within limits, and every failure is one line that names the file.

Python's json module takes more than the standard and than is safe. Here a key that occurs twice is refused, because one
of its values would be lost, and so are NaN, infinities, numbers of hundreds of digits, half of a surrogate pair
(no such text can be written again), nesting that exhausts the stack of whatever walks the data, and files without end.
"""

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from fm_jax.core import files
from fm_jax.core.errors import FmError, shown

MOST = 16 << 20
"""Bytes of a file; a config.json with 21,841 labels has 2 MB."""

_DEPTH = 64  # arrays and objects in each other
_DIGITS = 40  # tokenizers publish 1000000000000000019884624838656 as their length
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read(file: Path, error: type[FmError], *, most: int = MOST) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        file: a UTF-8 file, with or without a byte order mark.
        error: class of the error to raise.
        most: largest size in bytes.

    Raises:
        FmError: of class `error`: there is no such file, it cannot be read or is too large, or it is not a JSON object.
    """
    data = parse(contents(file, error, most=most), str(file), error)
    if not isinstance(data, dict):
        raise error(f"{file} holds a {type(data).__name__}, not a JSON object")
    return data


def contents(file: Path, error: type[FmError], *, most: int = MOST) -> bytes:
    """Return the bytes of a file of limited size; reading from a pipe or a device might never end."""
    if not files.there(file, error):
        raise error(f"{file} does not exist")
    try:
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as problem:
        raise error(f"{file} cannot be read: {problem.strerror or problem}") from problem
    if len(data) > most:
        raise error(f"{file} is larger than {most:,} bytes, the most that is read of such a file")
    return data


def parse(text: str | bytes, where: str, error: type[FmError], *, halves: bool = False) -> Any:
    """Return the data of a JSON text.

    Args:
        text: the text, or its UTF-8 bytes.
        where: names the text in messages: a file, or a file and a line.
        error: class of the error to raise.
        halves: accept half of a surrogate pair in a string, which cannot be encoded as UTF-8.

    Raises:
        FmError: of class `error`: it is not JSON, or exceeds a limit of this module.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        data = decoder().decode(text)
        _check_depth(data)
        if not halves and _SURROGATE.search(text):
            _check_surrogates(data)
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not JSON: it is not UTF-8 text (byte {problem.start})") from None
    except RecursionError:
        raise error(f"{where} is not JSON of this kind: it nests arrays and objects too deeply") from None
    except ValueError as problem:
        raise error(f"{where} is not JSON: {str(problem)[:160]}") from None
    return data


@cache
def decoder() -> json.JSONDecoder:
    """Return the decoder of `parse`, for values that stand one after another; it does not check their depth.

    Its failures are ValueErrors.
    """
    return json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer, parse_float=_real, parse_constant=_constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; a key that occurs twice raises ValueError."""
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return data


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits, more than {_DIGITS}")
    return int(text)


def _real(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _check_depth(data: Any) -> None:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(_DEPTH):
        parts = (part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"it nests arrays and objects more than {_DEPTH} deep")


def _check_surrogates(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text has half of a surrogate pair") from None
