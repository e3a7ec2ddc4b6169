"""Texts in files, packed or not: a text file each, or one field of rows. `data/files.py` finds the files of a split.

If no file is named after a split, documents are assigned by a hash of file and line: 90 % train, 5 % validation, 5 %
test. A single text file is cut at two places instead: its first 90 % are train, the next 5 % validation, the rest test.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data import files, packed, table
from fm_jax.data.files import Found
from fm_jax.data.text import dialogue

TEXT = packed.with_packed(".txt", ".md", ".rst")
ROWS = tuple(suffix for suffixes in table.SUFFIXES.values() for suffix in suffixes)

_SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
_LARGE = 1 << 22  # bytes; a larger text file is several documents: a tokenizer takes 200 bytes for each byte of a text
_SMALL = 1 << 12  # bytes; a larger file is not read to see whether it is blank
_CUT_WITHIN = 1 << 16  # bytes in which the end of a line, or a space, is looked for
_log = logging.getLogger(__name__)


class Texts(Protocol):
    """Texts by random access, and a fingerprint that changes when they change."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


class TextFiles:
    """One document per file (`*.txt`, `*.md`, `*.rst`, or `path` itself if it is a file); blank files are left out.

    A file of more than 4 MiB is several documents, cut at ends of lines.
    """

    def __init__(self, path: Path, split: str, *, own: str = "") -> None:
        """Open the files of a split; `own` is the corpus's name for it (see `files.find`).

        Raises:
            DataError: as `files.find`, no text, or more than half of the files are blank.
        """
        found = files.find(path, split, TEXT, own=own)
        chosen = _by_file(found, split)
        _check_some(len(chosen), path, split, len(found.files), "files")
        self.fingerprint = _text_mark(found, split)
        spool = packed.Spool() if any(map(packed.is_packed, chosen)) else None
        contents = [_content(file, spool) for file in chosen]
        blank = [content.is_blank() for content in contents]
        _refuse_blank([content.file for content, empty in zip(contents, blank, strict=True) if empty], len(blank), path)
        shares = (0.0, 1.0)
        if _is_single(found):
            shares = _SHARES[split]
            low, high = (round(100 * share) for share in shares)
            _log.warning("%s is one text: from %d %% to %d %% of it is the split %s", chosen[0], low, high, split)
        kept = [content for content, empty in zip(contents, blank, strict=True) if not empty]
        self._pieces = [(content, *piece) for content in kept for piece in content.pieces(*shares)]
        if not self._pieces:
            raise DataError(f"{path} is too short to cut a {split} split from it; add text, or a file for each split")

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> str:
        content, start, stop = self._pieces[index]
        data = content.read(start, stop)
        try:
            text = data.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            line = content.lines(start) + data[: error.start].count(b"\n") + 1
            raise table.not_utf8(content.file, line, start, data, error) from None
        if not text.strip():
            raise DataError(f"{content.file} is empty from byte {start} to byte {stop}; remove it or add text")
        return text


def text_fingerprint(path: Path, split: str, *, own: str = "") -> str:
    """Return the fingerprint of `TextFiles` without reading them."""
    return _text_mark(files.find(path, split, TEXT, own=own), split)


def column(path: Path, split: str, field: str, *, suffixes: tuple[str, ...] = ROWS, own: str = "") -> Texts:
    """Open one field of rows: JSON lines or lists, CSV, TSV or Parquet.

    Lines of a plain file are read where they lie. Rows of any other form are unpacked once, to a temporary file.

    Args:
        path: a folder, or one file.
        split: train, validation or test.
        field: the field with the text, or with a conversation (see `dialogue.text`).
        suffixes: of the files to look at.
        own: the data set's name for the split (see `files.find`).

    Raises:
        DataError: as `files.find`; no rows; or, at the latest when a text is read, a damaged row, by file and line.
    """
    found = files.find(path, split, suffixes, own=own)
    mark = _fingerprint(f"{table.one_form(found)}-{field}", split, found.root, found.files)
    plain = all(table.form(file) == "jsonl" and not packed.is_packed(file) for file in found.files)
    if plain and not any(map(table.is_list, found.files)):
        return JsonLines(found, split, field, mark)
    return Unpacked(found, split, field, mark)


def column_fingerprint(path: Path, split: str, field: str, *, suffixes: tuple[str, ...] = ROWS, own: str = "") -> str:
    """Return the fingerprint of `column` without reading the files."""
    found = files.find(path, split, suffixes, own=own)
    return _fingerprint(f"{table.one_form(found)}-{field}", split, found.root, found.files)


@dataclass(frozen=True)
class Placed:
    """A row, and where it is from."""

    fields: table.Row
    where: str  # how messages name it
    form: table.Form


def rows(path: Path, split: str, fields: Sequence[str]) -> list[Placed]:
    """Read all rows of a split into memory.

    Raises:
        DataError: as `column`.
    """
    found, kept, total = files.find(path, split, ROWS), [], 0
    form = table.one_form(found)
    for file in found.files:
        keep = _by_row(found, file, split)
        for number, row in table.rows(file, fields):
            total += 1
            if keep(number):
                kept.append(Placed(row, table.place(file, number), form))
    _check_some(len(kept), path, split, total, "rows")
    return kept


def text_of(row: table.Row, field: str, where: str) -> str:
    """Return the text in a field of a row; a conversation in it, or in "messages" for want of a "text", is spelt out.

    Raises:
        DataError: no such field, or it is neither text nor a conversation.
    """
    if field == "text" and not table.has(row, field) and table.has(row, dialogue.FIELD):
        field = dialogue.FIELD
    value = table.value(row, field, where)
    return dialogue.text(value, field, where) if isinstance(value, list) else table.text(value, field, where)


class JsonLines:
    """One text per line of plain files; blank lines are skipped. Opening reads every file once, to index the lines."""

    def __init__(self, found: Found, split: str, field: str, mark: str) -> None:
        self._files, self._field, self.fingerprint = found.files, field, mark
        parts, total = [], 0
        for number, file in enumerate(found.files):
            starts, lines = _lines(file)
            total += len(starts)
            if not found.named:
                mine = np.array(list(map(_by_row(found, file, split), lines.tolist())), bool)
                starts, lines = starts[mine], lines[mine]
            parts.append(np.stack([np.full(len(lines), number), starts, lines]))
        self._index = np.concatenate(parts, axis=1)  # [3, N]: file, byte, line
        _check_some(len(self), found.files[0] if len(found.files) == 1 else found.root, split, total, "lines")

    def __len__(self) -> int:
        return self._index.shape[1]

    def __getitem__(self, index: int) -> str:
        number, start, line = (int(x) for x in self._index[:, index])
        file = self._files[number]
        try:
            with open(file, "rb") as stream:
                stream.seek(start)
                raw = stream.readline(table.MAX_LINE + 1)
        except OSError as error:
            raise files.failed(error, f"cannot read {file}") from error
        where = table.place(file, line)
        return text_of(table.parsed(raw, where, first=start == 0), self._field, where)


class Unpacked:
    """One text per row of packed files, lists, CSV, TSV or Parquet; they are read once, into a temporary file."""

    def __init__(self, found: Found, split: str, field: str, mark: str) -> None:
        self._found, self._split, self._field, self.fingerprint = found, split, field, mark
        _ = self._texts  # a damaged file is found now, not in the middle of a run

    def __len__(self) -> int:
        return len(self._texts[1]) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        spool, bounds = self._texts
        return spool.read(int(bounds[index]), int(bounds[index + 1])).decode()

    def __getstate__(self) -> dict[str, Any]:
        # A worker process unpacks its own copy: the file has no name that could be sent.
        return {name: value for name, value in self.__dict__.items() if name != "_texts"}

    @cached_property
    def _texts(self) -> tuple[packed.Spool, np.ndarray]:
        """The texts, one after another, and where each starts and the last ends: int64 [N + 1]."""
        spool, bounds, total = packed.Spool(), [0], 0
        for file in self._found.files:
            keep = _by_row(self._found, file, self._split)
            either = self._field == "text" and table.form(file) == "parquet"  # see `text_of`
            wanted = {"fields": (), "optional": ("text", dialogue.FIELD)} if either else {"fields": (self._field,)}
            for number, row in table.rows(file, **wanted):
                total += 1
                if keep(number):
                    bounds.append(spool.append(text_of(row, self._field, table.place(file, number)).encode()))
        found = self._found
        _check_some(
            len(bounds) - 1, found.files[0] if len(found.files) == 1 else found.root, self._split, total, "rows"
        )
        return spool, np.array(bounds, np.int64)


@dataclass(frozen=True)
class _Content:
    """The bytes of a text file; those of a packed file lie in a spool, from `begin`."""

    file: Path
    size: int
    spool: packed.Spool | None = None
    begin: int = 0

    def read(self, start: int, stop: int) -> bytes:
        if self.spool is not None:
            return self.spool.read(self.begin + start, self.begin + stop)
        try:
            with open(self.file, "rb") as stream:
                stream.seek(start)
                return stream.read(stop - start)
        except OSError as error:
            raise files.failed(error, f"cannot read {self.file}") from error

    def is_blank(self) -> bool:
        return self.size <= _SMALL and not self.read(0, self.size).removeprefix(b"\xef\xbb\xbf").strip()

    def pieces(self, low: float, high: float) -> list[tuple[int, int]]:
        """Return (first byte, last + 1) of the documents of a part of the file."""
        start, stop, pieces = self._cut(int(low * self.size)), self._cut(int(high * self.size)), []
        while start < stop:
            end = min(self._cut(start + _LARGE), stop) if stop - start > _LARGE else stop
            pieces.append((start, end))
            start = end
        return pieces

    def lines(self, stop: int) -> int:
        """Return the number of line ends before a byte."""
        return sum(self.read(at, min(at + _LARGE, stop)).count(b"\n") for at in range(0, stop, _LARGE))

    def _cut(self, position: int) -> int:
        """Return the next place to cut from a byte on: after a line, else after a space, else between characters."""
        if position <= 0 or position >= self.size:
            return min(max(position, 0), self.size)
        ahead = self.read(position, min(position + _CUT_WITHIN, self.size))
        for end in (b"\n", b" "):
            if (at := ahead.find(end)) >= 0:
                return position + at + 1
        return position + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))


def _content(file: Path, spool: packed.Spool | None) -> _Content:
    if spool is None or not packed.is_packed(file):
        return _Content(file, files.check(file).st_size)
    begin = spool.size
    with packed.reading(file) as stream:
        while data := stream.read(1 << 20):
            spool.append(data)
    return _Content(file, spool.size - begin, spool, begin)


def _text_mark(found: Found, split: str) -> str:
    return _fingerprint("text-cut" if _is_single(found) else "text", split, found.root, _by_file(found, split))


def _is_single(found: Found) -> bool:
    return len(found.files) == 1 and not found.named


def _by_file(found: Found, split: str) -> tuple[Path, ...]:
    """Return the files of a split, by their names or by a hash of them; a single file is in every split."""
    if found.named or _is_single(found):
        return found.files
    return tuple(file for file in found.files if _in(split, file.relative_to(found.root).as_posix()))


def _by_row(found: Found, file: Path, split: str) -> Callable[[int], bool]:
    """Return whether the row of a number belongs to the split: by the file's name, or by a hash."""
    if found.named:
        return lambda number: True
    name = file.relative_to(found.root).as_posix()
    return lambda number: _in(split, f"{name}:{number}")


def _lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the start byte and the number of each line that is not blank, both int64 [N]."""
    with packed.reading(file) as stream:
        found = [(start, number) for number, start, line in table.lines(stream, file) if line.strip()]
    index = np.array(found, np.int64).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def _in(split: str, name: str) -> bool:
    share = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32
    low, high = _SHARES[split]
    return low <= share < high


def _check_some(count: int, path: Path, split: str, total: int, unit: str) -> None:
    if not total:
        raise DataError(f"{path} is empty")
    if not count:
        raise DataError(
            f"none of the {total} {unit} of {path} fall into split {split!r}; "
            "sort them into folders train, validation and test"
        )


def _refuse_blank(blank: Sequence[Path], total: int, path: Path) -> None:
    if 2 * len(blank) > total:
        more = f"; so are {len(blank) - 1} more of {total} files" if len(blank) > 1 else ""
        raise DataError(f"{blank[0]} is empty{more}; remove them or add text")
    if blank:
        _log.warning("%s: %d of %d files are empty and left out, first %s", path, len(blank), total, blank[0].name)


def _fingerprint(kind: str, split: str, root: Path, chosen: Sequence[Path]) -> str:
    """Hash the files' names, sizes and modification times; hashing a large corpus itself would take minutes."""
    digest = hashlib.sha256(f"{kind}\0{split}\0".encode())
    for file in chosen:
        info = files.check(file)
        line = f"{file.relative_to(root).as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return f"{kind}-{split}-{digest.hexdigest()[:16]}"
