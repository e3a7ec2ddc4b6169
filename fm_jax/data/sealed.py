"""index.json: what a data folder holds, and the digests by which any damage to it is found when it is opened.

The file ends with "digests", the SHA-256 of the files beside it, and "seal", the SHA-256 of all that stands before. It
is written last, and read back byte by byte, so a flipped bit anywhere in it is seen. A folder that was written before
there were seals has neither of the two.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError
from fm_jax.core.workdir import write_atomically
from fm_jax.data import files

NAME = "index.json"
AGAIN = "delete the folder and write it again"

_LONGEST = 1 << 26  # bytes of index.json
_MARK = ".verified.json"
_MARK_FROM = 1 << 30  # bytes; SHA-256 takes half a second for a gigabyte (1.8 GB/s), without SHA instructions two
_FRESH = 2_000_000_000  # ns in which a file may change again without getting another time


def write(folder: Path, fields: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    """Write index.json: `fields`, and the digests of the files `names`, which must be complete."""
    digests = {name: _sha256(folder / name) for name in names}
    with open(folder / NAME, "xb") as file:
        file.write(_spelt({**fields, "digests": digests}))
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, what: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return the fields of index.json and the digests that `verify` takes, None for a folder without a seal.

    Raises:
        DataError: missing, unreadable, or damaged; `what` the folder should hold is named.
    """
    file = folder / NAME
    if not os.path.lexists(file):
        raise DataError(f"{folder} has no {NAME}; it does not hold {what}")
    files.check(file)
    try:
        data = json_file.contents(file, DataError, most=_LONGEST)
        fields = json_file.parse(data, str(file), DataError)
    except DataError as error:
        raise DataError(f"{file} is damaged: {error}; {AGAIN}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file} is damaged: it holds {type(fields).__name__}, not an object; {AGAIN}")
    if "seal" not in fields and "digests" not in fields:
        return fields, None
    fields.pop("seal", None)
    if data != _spelt(fields) or not isinstance(digests := fields.pop("digests", None), dict):
        raise DataError(f"{file} is damaged: its content differs from its seal; {AGAIN}")
    return fields, digests


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare the content of files with their digests.

    A folder of more than a gigabyte is read once: a hidden file keeps the files' sizes, times and inodes, and while all
    of them are the same it is not read again.

    Raises:
        DataError: a file is missing or damaged, or no regular file.
    """
    states = {name: _state(folder / name) for name in digests}
    mark = hashlib.sha256(repr((sorted(digests.items()), sorted(states.items()))).encode()).hexdigest()
    large = sum(state[0] for state in states.values()) >= _MARK_FROM
    if large and _marked(folder) == mark:
        return
    for name, wanted in digests.items():
        state = states[name]
        settled = time.time_ns() - state[1] > _FRESH
        if (_remembered(folder / name, state) if settled else _sha256(folder / name)) != wanted:
            raise DataError(f"{folder / name} is damaged: its hash differs from {NAME}; {AGAIN}")
        large &= settled
    if large:
        try:
            write_atomically(folder / _MARK, mark)
        except OSError:  # a folder that is only read is hashed at every start
            return


def _spelt(fields: Mapping[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, "seal": seal}, indent=1).encode()


def _state(file: Path) -> tuple[int, int, int, int]:
    status = files.check(file)
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _marked(folder: Path) -> str:
    try:
        files.check(folder / _MARK)
        return (folder / _MARK).read_text("ascii")
    except (DataError, OSError, ValueError):
        return ""


@cache
def _remembered(file: Path, state: tuple[int, int, int, int]) -> str:
    """Return the hash of a file; one that still has this state is not read again by this process."""
    del state
    return _sha256(file)


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise files.failed(error, f"cannot read {file}") from error
