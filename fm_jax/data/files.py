"""Files of a data set on disk: which of them form a split, and what is refused before it is opened.

A split is a folder of its name, or the files whose names start with it: `train/…`, `train.jsonl`, `dev-v1.1.json`,
`test-00000-of-00002.parquet`. Every reader finds them by this file, so a name means the same everywhere.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fm_jax.core.errors import DataError, FmError, ResourceError
from fm_jax.core.files import status
from fm_jax.data.packages import cache

CALLED = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
"""Split -> the names that people give it."""

_FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the limit on a file's size (ulimit -f)",
    errno.EMFILE: "this process has too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
}


@dataclass(frozen=True)
class Found:
    """The files to read for a split."""

    root: Path  # names in messages and fingerprints are relative to it
    files: tuple[Path, ...]
    named: bool  # they are named after the split; if not, a reader divides their content


def failed(error: Exception, doing: str) -> FmError:
    """Return the error of one line for a call that failed while `doing` ("cannot write FILE").

    The writers of ArrayRecord raise a RuntimeError that only spells the cause.
    """
    code = getattr(error, "errno", None) or next((code for code in _FULL if os.strerror(code) in str(error)), None)
    if code in _FULL:
        return ResourceError(f"{doing}: {_FULL[code]}")
    why = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return DataError(f"{doing}: {why.splitlines()[0][:200]}")


def check(file: Path) -> os.stat_result:
    """Return the status of a regular file, or of the one that a link leads to.

    Raises:
        DataError: missing, a link to nothing, or a folder, pipe, socket or device, which could block for ever.
    """
    if (found := status(file, DataError)) is None:
        raise DataError(f"{file} does not exist{cache.remedy(file)}")
    return found


def walk(folder: Path, suffixes: tuple[str, ...], above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield (path, bytes) of the files under a folder with one of the suffixes, each folder sorted.

    Hidden files are left out. Links are followed; one to nothing has 0 bytes, and `check` says why.

    Raises:
        DataError: a folder cannot be read, or links to one that contains it.
    """
    try:
        found = os.stat(folder)
        if (here := (found.st_dev, found.st_ino)) in above:
            raise DataError(f"{folder} links to a folder that contains it; remove the link")
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise failed(error, f"cannot read {folder}") from error
    for entry in entries:
        try:
            inside, size = entry.is_dir(), entry.stat().st_size
        except OSError:
            inside, size = False, 0
        if inside:
            yield from walk(Path(entry.path), suffixes, (*above, here))
        elif entry.name.lower().endswith(suffixes):
            yield entry.path, size


def find(path: Path, split: str, suffixes: tuple[str, ...], *, own: str = "") -> Found:
    """Find the files of a split, or all files if none is named after any split.

    Args:
        path: a folder, or one file.
        split: train, validation or test.
        suffixes: of the files to look at, in lower case, such as (".txt", ".txt.gz").
        own: the data set's name for the split, if it is not one of `CALLED`.

    Raises:
        DataError: missing, no files, none for this split, two names for it, or a file that is no regular file.
    """
    if not path.is_dir():
        check(path)
        return Found(path.parent, (path,), False)
    files = [Path(file) for file, _ in walk(path, suffixes)]
    if not files:
        plain = [suffix for suffix in suffixes if suffix.count(".") == 1]
        raise DataError(f"{path} has no {' or '.join('*' + suffix for suffix in plain)} files")
    tops = {file: file.relative_to(path).parts[0] for file in files}
    chosen = of_split(tops.values(), split, path, own=own)
    named = chosen is not None
    mine = tuple(file for file, top in tops.items() if chosen is None or top in chosen)
    for file in mine:
        check(file)
    return Found(path, mine, named)


def of_split(names: Iterable[str], split: str, where: Path, *, own: str = "") -> set[str] | None:
    """Return the names that belong to a split; None if no name is that of any split.

    Raises:
        DataError: other splits have files and this one has none, or it goes by two names (dev and valid).
    """
    names = sorted(set(names))
    every = {alias for aliases in CALLED.values() for alias in aliases} | ({own} if own else set())
    if not any(called(name, alias) for name in names for alias in every):
        return None
    wanted = CALLED[split] if own in ("", split) else (own,)
    mine = {alias: [name for name in names if called(name, alias)] for alias in wanted}
    mine = {alias: here for alias, here in mine.items() if here}
    if not mine:
        has = ", ".join(names[:8])
        also = f" ({', '.join(wanted[1:])})" if len(wanted) > 1 else ""
        raise DataError(f"{where} has no folder or file named after the split {wanted[0]!r}{also}; it contains {has}")
    if len(mine) > 1:
        both = " and ".join(here[0] for here in mine.values())
        raise DataError(f"{where} has {both}, each of which may be the {split} split; move or rename one")
    return set(next(iter(mine.values())))


def folder_of(root: Path, split: str) -> Path:
    """Return the folder of a split: that of one of its names in `CALLED`, or of just this name if it is none of them.

    Raises:
        DataError: it goes by two names (dev and valid).
    """
    there = [root / alias for alias in CALLED.get(split, (split,)) if (root / alias).is_dir()]
    if len(there) > 1:
        both = f"{there[0].name} and {there[1].name}"
        raise DataError(f"{root} has {both}, each of which may be the {split} split; move or rename one")
    return there[0] if there else root / split


def called(name: str, alias: str) -> bool:
    """Return whether a file or folder is named so: for train, train.txt and train-00001.txt, not trainees.txt."""
    return name == alias or (name.startswith(alias) and not name[len(alias)].isalnum())
