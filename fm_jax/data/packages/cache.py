"""One folder a set, outside the repository: complete or absent, with its licence and a record of every file's digest.

The cache is `$FM_DATA`, else `$FM_CACHE/data`, `$XDG_CACHE_HOME/fm_jax/data`, `~/.cache/fm_jax/data`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError
from fm_jax.data.packages.sources import SOURCES, Source

RECORD, LICENCE = "SOURCE.json", "LICENSE.txt"
_WORK = ".fetch-"  # prefix of what is being written; under the lock, any such folder is left over from a killed run


def root() -> Path:
    """Return the cache's folder, whether it exists or not."""
    if own := os.environ.get("FM_DATA"):
        return Path(own)
    if shared := os.environ.get("FM_CACHE"):
        return Path(shared) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fm_jax" / "data"


def place(name: str) -> Path:
    """Return the folder of a set, whether it exists or not."""
    return root() / name


def remedy(path: Path) -> str:
    """Return what brings a missing file or folder: "; ./launch.sh local … brings it" for a set's, else nothing."""
    with contextlib.suppress(ValueError):
        if (name := path.relative_to(root()).parts[:1]) and name[0] in SOURCES:
            return f"; ./launch.sh local experiments.fetch --name {name[0]} brings it"
    return ""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a cache for this process, waiting for another; make it if needed, and remove what a killed run left.

    Raises:
        DataError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            _wait(lock, folder)
        except OSError:  # a file system without locks: what lies there may be another process's work
            print(f"{folder} has no file locks: run one fetch at a time", file=sys.stderr)
        else:
            for path in folder.glob(f"{_WORK}*"):
                shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def _wait(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that writes to {folder}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Give a hidden folder in a cache; it is removed at the end.

    Raises:
        DataError: the cache cannot be written.
    """
    part = folder / f"{_WORK}{os.urandom(4).hex()}"
    try:
        part.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write into; rename it to `folder` at the end, or remove it after an error."""
    with scratch(folder.parent) as part:
        yield part
        os.sync()  # once for all files: flushing each of thousands takes minutes
        part.rename(folder)


def seal(part: Path, name: str, source: Source, versions: Mapping[str, str], counts: Mapping[str, Any]) -> None:
    """Write the record of a finished folder: where it comes from, its licence, counts, and the digest of every file."""
    files = {}
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(part).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    record = {
        "name": name,
        "layout": source.layout,
        "packages": [
            {
                "client": package.client,
                "name": package.name,
                "version": versions[package.name],
                "sha256": package.sha256,
            }
            for package in source.packages
        ],
        "licence": source.licence,
        "attribution": source.attribution,
        "counts": dict(counts),
        "files": files,
    }
    (part / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def opened(folder: Path, source: Source) -> dict[str, Any] | None:
    """Return the record of a folder after verifying every file; None if there is no such folder.

    Raises:
        DataError: it was not written by this version of the converter, or a file is missing or differs.
    """
    if not folder.exists():
        return None
    again = "move it away, and fetch it again"
    if not (folder / RECORD).exists():
        raise DataError(f"{folder} exists and has no {RECORD}: this command did not write it; {again}")
    try:
        record = json_file.read(folder / RECORD, DataError)
        layout, files, packages = record["layout"], dict(record["files"]), record["packages"]
        sums = [package["sha256"] for package in packages]
        _ = record["counts"], [(entry["bytes"], entry["sha256"]) for entry in files.values()]
    except (DataError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder / RECORD} is damaged; {again}") from None
    if layout != source.layout or sums != [package.sha256 for package in source.packages]:
        raise DataError(f"{folder} was written by another version of this command; {again}")
    for name, entry in files.items():
        if problem := _problem(folder / name, entry):
            raise DataError(f"{folder}: {name} is damaged ({problem}); {again}")
    return record


def _problem(path: Path, entry: Mapping[str, Any]) -> str:
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != entry["bytes"]:
                return f"{size} bytes instead of {entry['bytes']}"
            return "" if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"] else "its sha256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or type(error).__name__


def _unwritable(folder: Path, error: OSError) -> OSError | DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error  # the command line knows it
    return DataError(f"{folder} cannot be written ({error.strerror}); give another folder with --to, or set FM_DATA")
