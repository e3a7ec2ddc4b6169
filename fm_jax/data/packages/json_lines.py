"""Read and write whole files of JSON lines."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError

# Legal inside JSON texts, and line ends to str.splitlines and some editors: written escaped.
_BREAKS = str.maketrans({code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)})


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line; blank lines are skipped.

    Raises:
        DataError: a line is not a JSON object; the message names file and line.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = json_file.parse(line, f"{path.name}:{number}", DataError)
            if not isinstance(row, dict):
                raise DataError(f"{path.name}:{number}: {type(row).__name__}, not a JSON object")
            rows.append(row)
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a new file, one object a line, and return the number of lines."""
    count = 0
    with path.open("x", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).translate(_BREAKS) + "\n")
            count += 1
    return count


def text(row: Mapping[str, Any], field: str, where: str) -> str:
    """Return a field that must be text with something in it, without white space around.

    Raises:
        DataError: the field is missing, empty or not text.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {field!r} is {str(value)[:40]!r}, not a text")
    return value.strip()
