"""Files and folders from outside, checked before they are opened or written: each problem is one line with the path."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fm_jax.core.errors import FmError, ResourceError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def there(path: str | Path, error: type[FmError]) -> bool:
    """Say whether a path leads, through links, to a regular file; see `status`."""
    return status(path, error) is not None


def status(path: str | Path, error: type[FmError]) -> os.stat_result | None:
    """Return the status of the regular file to which a path leads, through links; None if nothing has this name.

    A link to nothing is not the same as no file, and reading from a pipe might wait for ever.

    Raises:
        FmError: of class `error`: the name is that of a folder, a pipe or a broken link, or it cannot be looked up.
    """
    path = Path(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise error(f"{path} is a link to {os.readlink(path)}, which does not exist; get it again") from None
        return None
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        raise error(f"{path} cannot be opened: {getattr(problem, 'strerror', None) or problem}") from problem
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "of another kind")
        raise error(f"{path} is {kind}, not a file; remove or replace it")
    return found


def check_target(folder: str | Path, error: type[FmError]) -> None:
    """Raise unless a new folder can be written here; an empty one may exist. Call it before the computation.

    Raises:
        FmError: of class `error`: something is there, or the place is none where a folder can be made.
        ResourceError: no space is left.
    """
    folder = Path(folder)
    with writing(folder, error):
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise error(f"{folder} exists already; give another folder, or move it away")
        if folder.is_dir() and os.path.ismount(folder):  # it could not be replaced by the finished folder
            raise error(f"{folder} is a mount point; give a folder inside it")
        above = next(parent for parent in folder.absolute().parents if parent.is_symlink() or parent.exists())
        if not above.is_dir():
            raise error(f"{folder} cannot be written: {above} is not a folder; give another folder")
        probe = above / f".{os.urandom(8).hex()}.probe"  # only an attempt shows quotas and read-only mounts
        probe.mkdir()
        probe.rmdir()


@contextlib.contextmanager
def writing(path: str | Path, error: type[FmError]) -> Iterator[None]:
    """Turn the operating system's errors while something is written into one line that names `path`.

    Raises:
        FmError: of class `error`, with the reason.
        ResourceError: no space is left.
    """
    try:
        yield
    except OSError as problem:
        said = f"{path} cannot be written: {problem.strerror or problem}"
        if problem.errno in _FULL:
            raise ResourceError(f"{said}; free some space, or give another place") from problem
        raise error(f"{said}; give another place") from problem
