"""Seal a folder: flush its files to disk, add their sizes and digests, and only then rename it to its final name.

Orbax commits by a rename but does not flush its metadata files or the rename, so a power cut can empty every checkpoint
of a run; and it reads flipped bits without notice. A folder renamed by `publish` is complete after a power cut, and
`verify` detects every changed bit.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import CheckpointError, FmError, ResourceError

SEAL = "seal.json"


def publish(folder: Path, final: Path) -> int:
    """Flush `folder` to disk, write its seal into it, rename it to `final`, and return its size in bytes.

    Raises:
        OSError: a flush, a write or the rename failed; then `final` does not exist.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    write(folder / SEAL, _text(files))
    for inner, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(inner))
    os.replace(folder, final)
    sync_folder(final.parent)
    sync_folder(folder.parent)
    return sum(entry["bytes"] for entry in files.values())


def steps(directory: Path) -> list[int]:
    """Return the sealed steps in `directory`, oldest first; [] if there is no such directory."""
    return sorted(int(path.name) for path in _numbered(directory) if (path / SEAL).is_file())


def unsealed(directory: Path) -> list[int]:
    """Return the steps whose folder in `directory` has no seal: partially copied, or not written by fm_jax."""
    return sorted(int(path.name) for path in _numbered(directory) if not (path / SEAL).is_file())


def verify(folder: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare every file of a sealed folder, or the i-th of n shares of them, with its digest.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names step and file.
    """
    files = sorted(manifest(folder).items())[share[0] :: share[1]]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        problems = list(pool.map(lambda item: _problem(folder / item[0], item[1]), files))
    for (name, _), problem in zip(files, problems, strict=True):
        if problem:
            raise damaged(folder, name, problem)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {file: {"bytes", "sha256"}} of a sealed folder; CheckpointError if the seal is missing or damaged."""
    try:
        text = (folder / SEAL).read_text()
    except FileNotFoundError:
        raise CheckpointError(f"{_place(folder)} has no {SEAL}, so it is unfinished; use another step") from None
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(folder, SEAL, type(error).__name__) from error
    try:
        files = json_file.parse(text, SEAL, CheckpointError)["files"]
        whole = _text(files) == text and all(_is_entry(entry) for entry in files.values())
    except (CheckpointError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise damaged(folder, SEAL, "its sha256 differs")
    return files


def read(folder: Path, name: str) -> bytes:
    """Return one file of a sealed folder after verifying its digest; CheckpointError if it differs."""
    entry = manifest(folder).get(name)
    if entry is None:
        raise damaged(folder, name, "the seal does not list it")
    if problem := _problem(folder / name, entry):
        raise damaged(folder, name, problem)
    return (folder / name).read_bytes()


def write(path: Path, text: str) -> None:
    """Write a new file and flush it to disk."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk; otherwise a created or renamed file can disappear in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged(folder: Path, name: str, problem: str) -> CheckpointError:
    """Return the error for one file of a checkpoint, in at most 400 characters."""
    name = name if len(name) <= 120 else f"{name[:50]}…{name[-69:]}"
    return CheckpointError(f"{_place(folder)}: {name} is damaged ({problem}); copy it again or use another step")


def failure(what: str, error: Exception) -> FmError:
    """Turn an error of the operating system or Orbax into one line; ResourceError if space or memory ran out."""
    if isinstance(error, FmError):
        return error
    text = " ".join(str(error).split())
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search(r"RESOURCE_EXHAUSTED|No space left|File too large|Disk quota", text):
        kind = "memory" if re.search(r"[Oo]ut of memory|allocat", text) else "space on the disk"
        return ResourceError(f"{what} failed: no {kind} left ({text[:120]})")
    return CheckpointError(f"{what} failed: {type(error).__name__}: {text[:200]}")


def _place(folder: Path) -> str:
    parent = str(folder.parent)
    return f"checkpoint {folder.name[:20]} in {parent if len(parent) <= 120 else '…' + parent[-119:]}"


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def _problem(path: Path, entry: dict[str, Any]) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                return f"{size} bytes instead of {entry['bytes']}"
            return "" if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"] else "its sha256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or type(error).__name__


def _text(files: dict[str, dict[str, Any]]) -> str:
    """Return the only text that a seal of these files can have, its own digest included."""
    body = json.dumps(files, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"files":{body},"format":1,"sha256":"{digest}"}}\n'


def _files(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder):
        yield from (Path(inner) / name for name in sorted(names))


def _numbered(directory: Path) -> list[Path]:
    """Return the folders whose whole name is a step."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name) and path.is_dir()]
