"""results.json: the measurements of a run, written atomically."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError
from fm_jax.core.workdir import write_atomically


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, replacing the file atomically.

    NumPy and JAX numbers and arrays become numbers and lists, paths strings, tuples lists. NaN and infinity become
    null because JSON has neither.

    Raises:
        DataError: a value of another type.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plain(results, path.name), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a file written by `write`.

    Raises:
        DataError: the file is missing or not a JSON object.
    """
    return json_file.read(path, DataError)


def once(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `path` from an earlier start of this run, or make and write it."""
    if not path.exists():
        write(path, make())
    return read(path)


def plain(value: Any, where: str) -> Any:
    """Return a value as JSON data, as `write` says; `where` names it in an error.

    Raises:
        DataError: a value that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part, f"{where}: {key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, where) for part in value]
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays
        return plain(value.tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise DataError(f"{where} is a {type(value).__name__}, not JSON data; give numbers, text, lists or mappings")
