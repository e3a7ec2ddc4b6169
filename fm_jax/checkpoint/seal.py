"""Seal a folder: flush its files to disk, add their sizes and digests, and only then rename it to its final name.

Orbax commits by a rename but does not flush its metadata files or the rename, so a power cut can empty every checkpoint
of a run; and it reads flipped bits without notice. A folder renamed by `publish` is complete after a power cut, and
`verify` detects every changed bit. A file that differs from its digest is damaged; one that the system fails to read
may be whole, so an error of the disk is never taken for absence or damage.
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
_REMEDY = "copy it again, choose another step (--init.step; hub_convert: --step), or move it away to resume without it"


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
    write(folder / SEAL, _text(files, "files").encode())
    for inner, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(inner))
    os.replace(folder, final)
    sync_folder(final.parent)
    sync_folder(folder.parent)
    return sum(entry["bytes"] for entry in files.values())


def steps(directory: Path) -> list[int]:
    """Return the sealed steps in `directory`, oldest first; [] if there is no such directory.

    Raises:
        CheckpointError: the directory, or a folder in it, cannot be read.
    """
    return sorted(int(path.name) for path in _numbered(directory) if there(path / SEAL))


def unsealed(directory: Path) -> list[int]:
    """Return the steps whose folder in `directory` has no seal: it was lost, or the folder was copied in part."""
    return sorted(int(path.name) for path in _numbered(directory) if not there(path / SEAL))


def there(path: Path) -> bool:
    """Return whether a file or folder exists.

    Raises:
        CheckpointError: the system cannot tell, as on a failing disk; `Path.exists` may say False then.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        return False
    except OSError as error:
        raise CheckpointError(f"{_short(path)} could not be read ({_reason(error)}); try again") from error
    return True


def verify(folder: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare every file of a sealed folder, or the i-th of n shares of them, with its digest.

    Raises:
        CheckpointError: a file is missing, truncated, changed or cannot be read; the message names step and file.
    """
    files = sorted(manifest(folder).items())[share[0] :: share[1]]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        problems = list(pool.map(lambda item: _problem(folder, *item), files))
    for problem in problems:
        if problem is not None:
            raise problem


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {file: {"bytes", "sha256"}} of a sealed folder.

    Raises:
        CheckpointError: the seal is missing, damaged, or cannot be read.
    """
    try:
        files = _digested(_content(folder / SEAL), "files")
    except FileNotFoundError:
        raise missing(folder) from None
    except OSError as error:
        raise unread(folder, SEAL, error) from error
    except _Damaged:
        files = {"": None}
    if not all(_is_entry(entry) for entry in files.values()):
        raise damaged(folder, SEAL, "its sha256 differs")
    return files


def read(folder: Path, name: str) -> bytes:
    """Return one file of a sealed folder; CheckpointError if it differs from its digest or cannot be read."""
    entry = manifest(folder).get(name)
    if entry is None:
        raise damaged(folder, name, "the seal does not list it")
    try:
        content = _content(folder / name)
    except FileNotFoundError:
        raise damaged(folder, name, "missing") from None
    except OSError as error:
        raise unread(folder, name, error) from error
    if problem := _difference(entry, len(content), hashlib.sha256(content).hexdigest()):
        raise damaged(folder, name, problem)
    return content


def write(path: Path, content: bytes) -> None:
    """Write a new file and flush it to disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def add(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Write JSON data, with its own digest, into a folder that is sealed already; the seal stays valid.

    Raises:
        OSError: it could not be written; then there is no such file.
    """
    pending = folder / f".{name}.{os.urandom(4).hex()}"
    try:
        write(pending, _text(values, "values").encode())
        os.replace(pending, folder / name)
    except OSError:
        pending.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def added(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what `add` wrote; None if it wrote nothing.

    Raises:
        CheckpointError: the file is damaged, or cannot be read.
    """
    try:
        return _digested(_content(folder / name), "values")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unread(folder, name, error) from error
    except _Damaged:
        raise damaged(folder, name, "its sha256 differs") from None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk; otherwise a created or renamed file can disappear in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged(folder: Path, name: str, problem: str) -> CheckpointError:
    """Return the error for a file that was read and is not what was sealed, in at most 400 characters."""
    return CheckpointError(f"{_place(folder)}: {_short(name, 60)} is damaged ({problem}); {_REMEDY}")


def unread(folder: Path, name: str, error: OSError) -> CheckpointError:
    """Return the error for a file that may be whole but could not be read, in at most 400 characters."""
    return CheckpointError(
        f"{_place(folder)}: {_short(name, 60)} could not be read ({_reason(error)}); try again, or {_REMEDY}"
    )


def missing(folder: Path) -> CheckpointError:
    """Return the error for a step without a seal."""
    return CheckpointError(f"{_place(folder)} has no {SEAL}, so it is unfinished; {_REMEDY}")


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
    return f"checkpoint {folder.name[:20]} in {_short(folder.parent)}"


def _short(path: Path | str, most: int = 100) -> str:
    text = str(path)
    return text if len(text) <= most else "…" + text[1 - most :]


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _content(path: Path) -> bytes:
    """Read a small file; the only place that reads seals and records."""
    return path.read_bytes()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def _problem(folder: Path, name: str, entry: dict[str, Any]) -> CheckpointError | None:
    """Compare a file of any size with its entry in the seal."""
    try:
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry["bytes"] else ""
    except FileNotFoundError:
        return damaged(folder, name, "missing")
    except OSError as error:
        return unread(folder, name, error)
    problem = _difference(entry, size, digest)
    return damaged(folder, name, problem) if problem else None


def _difference(entry: dict[str, Any], size: int, digest: str) -> str:
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    return "" if digest == entry["sha256"] else "its sha256 differs"


class _Damaged(Exception):
    """A text with a digest of its own is not the one that was written."""


def _text(values: dict[str, Any], key: str) -> str:
    """Return the only text with which these values can be stored under `key`, its own digest included."""
    body = json.dumps(values, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"{key}":{body},"format":1,"sha256":"{digest}"}}\n'


def _digested(content: bytes, key: str) -> dict[str, Any]:
    """Return the values of a text that `_text` made; `_Damaged` for any other."""
    try:
        text = content.decode()
        values = json_file.parse(text, SEAL, CheckpointError)[key]
        whole = isinstance(values, dict) and _text(values, key) == text
    except (CheckpointError, UnicodeDecodeError, KeyError, TypeError):
        raise _Damaged from None
    if not whole:
        raise _Damaged
    return dict(values)


def _files(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder):
        yield from (Path(inner) / name for name in sorted(names))


def _numbered(directory: Path) -> list[Path]:
    """Return the folders whose whole name is a step, and links with such names: what they point to may be away."""
    try:
        with os.scandir(directory) as entries:
            numbered = [entry for entry in entries if re.fullmatch(r"0|[1-9][0-9]{0,17}", entry.name)]
            return [Path(entry.path) for entry in numbered if entry.is_dir() or entry.is_symlink()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints in {_short(directory)} could not be listed ({_reason(error)}); put the directory back, "
            "or start anew with another --workdir"
        ) from error
