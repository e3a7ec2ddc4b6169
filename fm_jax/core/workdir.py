"""The work directory of a run: one experiment, one config, one trainer at a time.

run.json     the run: experiment, config, code, machine, and every start
owner.json   the running process; the lock is an flock on this file, so it ends with the process
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.config import changes
from fm_jax.core.errors import ConfigError, FmError, ResourceError

# what mounts, editors and launchers leave in a directory, and a plan of the run
_IGNORED = (".*", "lost+found", "*.log", "*.out", "*.err", "plan.json")
_MAX_STARTS = 1000
_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
    *(errno.EEXIST, errno.ELOOP),
)
"""Errors of the operating system that depend on the path, not on the disk's state."""


@dataclass
class Claim:
    """A work directory held by this process until `release` or the end of the process."""

    path: Path
    previous: dict[str, Any] | None  # run.json of the last start
    changed: list[str]  # allowed config changes since then, `key: old -> new`
    notices: list[str]  # lines for the user
    _lock: int

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json atomically, with this start added to its list of starts."""
        starts = (self.previous or {}).get("starts", [])
        this = {key: record[key] for key in ("time", "argv", "git", "devices") if key in record}
        data = {**record, "starts": [*starts, {**this, "changed": self.changed}][-_MAX_STARTS:]}
        write_atomically(self.path / "run.json", json.dumps(data, indent=1, allow_nan=False) + "\n")

    def release(self) -> None:
        """Release the directory; an empty owner.json marks a clean end."""
        if self._lock < 0:
            return
        os.ftruncate(self._lock, 0)
        if not (self.path / "run.json").exists():  # the run never began: remove its directory
            with contextlib.suppress(OSError):
                (self.path / "owner.json").unlink()
                self.path.rmdir()
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def claim(path: Path, *, experiment: str, config: Mapping[str, Any], resumable: Sequence[str] = ()) -> Claim:
    """Claim a new directory, or one where the same experiment ran with the same config.

    `resumable`: patterns (`fit.num_steps`, `log.*`) of keys that may differ from the earlier start. If that start
    left only its record (its data was refused, say), every key may differ. A refused directory is not changed.

    Raises:
        ConfigError: not writable, not ours, in use, or another experiment or config; the message lists changed keys.
        ResourceError: no space left.
    """
    try:
        return _claim(path, experiment, config, resumable)
    except FmError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left for workdir {path}") from error
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"workdir {str(path)[:120]!r} cannot be used: {reason}; give another --workdir") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically and sync it to disk: after a crash it is either the old file or the new one.

    Raises:
        ConfigError: the path cannot be written.
        ResourceError: no space left, or the disk fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: OSError) -> FmError:
    """Return one line for a file that could not be written: its place is wrong, or the disk is full or fails."""
    text = f"{'…' + str(path)[-150:] if len(str(path)) > 150 else path} cannot be written: {error.strerror or error}"
    if error.errno in _PLACE:
        return ConfigError(f"{text}; give a place that can be written")
    return ResourceError(f"{text}; free space or use another disk, and run the same command again")


def _claim(path: Path, experiment: str, config: Mapping[str, Any], resumable: Sequence[str]) -> Claim:
    if ":/" in str(path):
        raise ConfigError(f"workdir {path} is not a local path; mount the remote storage and give its mount point")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"workdir {path} is a file; give another --workdir")
    new = not path.exists()
    names = [] if new else sorted(entry.name for entry in path.iterdir())
    foreign = _kept(names)
    if foreign and "run.json" not in names and "owner.json" not in names:
        raise ConfigError(
            f"workdir {path} contains files that no run wrote ({', '.join(foreign[:3])}); give a new or empty --workdir"
        )
    path.mkdir(parents=True, exist_ok=True)
    lock, held = os.open(path / "owner.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), False
    try:
        notices, held = _take_lock(lock, path), True
        previous = _read_record(path)
        if previous is None and (rest := set(foreign) - {"owner.json"}):
            raise ConfigError(
                f"workdir {path} has the files of a run ({', '.join(sorted(rest)[:3])}), but its run.json is missing; "
                "put it back, or give another --workdir"
            )
        changed = [] if previous is None else _allowed_changes(path, previous, experiment, config, resumable)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id(), "started": _now()}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(owner).encode(), 0)
        os.fsync(lock)
    except BaseException:
        if held and "owner.json" not in names:  # else it is another process's, which began at the same moment
            with contextlib.suppress(OSError):
                (path / "owner.json").unlink()
                if new:
                    path.rmdir()
        os.close(lock)
        raise
    return Claim(path, previous, changed, notices + [f"{path}: {line}" for line in changed], lock)


def _take_lock(lock: int, path: Path) -> list[str]:
    """Lock owner.json; return a notice if its last owner ended without releasing it."""
    text = os.pread(lock, 10_000, 0).decode(errors="replace")
    try:
        owner = json_file.parse(text, "owner.json", ConfigError) if text else {}
        pid, host, started = int(owner.get("pid", 0)), str(owner.get("host")), owner.get("started")
    except (ConfigError, ValueError, AttributeError, TypeError):  # another process is writing it, or it was cut short
        pid, host, started = 0, "unknown", "unknown"
    here = host == socket.gethostname()
    gone = here and (owner.get("boot_id") != _boot_id() or not _alive(pid)) if pid else False
    who = f"pid {pid} on host {host} since {started}" if pid else "another process"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        more = "; that process has ended, but a child of it still holds the lock" if gone else ""
        raise ConfigError(f"workdir {path} is in use by {who}{more}") from None
    except OSError:  # a file system without locks: rely on the file's content
        if text and not gone:
            raise ConfigError(
                f"workdir {path} is in use by {who}; if that run has ended, remove {path / 'owner.json'}"
            ) from None
    if os.fstat(lock).st_nlink == 0:  # its owner removed it while this process opened it
        raise ConfigError(f"workdir {path} was released by {who} just now; run the command again")
    return [f"{path}: taking over from {who}, which did not end cleanly"] if text else []


def _read_record(path: Path) -> dict[str, Any] | None:
    file = path / "run.json"
    if not file.exists():
        return None
    try:
        record = json_file.read(file, ConfigError)
        starts = record.get("starts", [])
        if not isinstance(record["config"], dict) or not isinstance(starts, list):
            raise ConfigError(f"{file} has no config, or no list of starts")
        return {**record, "experiment": record["experiment"]}
    except (ConfigError, KeyError) as error:
        raise ConfigError(f"{file} is damaged ({error}); give another --workdir") from None


def _allowed_changes(
    path: Path, previous: Mapping[str, Any], experiment: str, config: Mapping[str, Any], resumable: Sequence[str]
) -> list[str]:
    """Return the config changes since the earlier start; ConfigError if one is not allowed."""
    # A module may have moved to another folder since then; only its own name (that of runs/NAME) must be the same.
    same = str(previous["experiment"]).rpartition(".")[2] == experiment.rpartition(".")[2]
    if not set(_kept(entry.name for entry in path.iterdir())) - {"run.json", "owner.json"}:  # it wrote nothing else
        if not same:
            return []
        resumable = ("*",)
    if not same:
        raise ConfigError(
            f"workdir {path} holds a run of {previous['experiment']}, not {experiment}; give another --workdir"
        )
    different = changes(previous["config"], config)
    lines = {key: f"{key}: {old} -> {new}" for key, (old, new) in different.items()}
    refused = [line for key, line in lines.items() if not any(fnmatchcase(key, pattern) for pattern in resumable)]
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ConfigError(
            f"workdir {path} holds a run with another config; give another --workdir, or restore the old values: "
            f"{'; '.join(line[:60] for line in refused[:5])}{more}"
        )
    return list(lines.values())


def _kept(names: Iterable[str]) -> list[str]:
    """Return the names except mount points, editor files and launcher logs (`_IGNORED`)."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _IGNORED)]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
