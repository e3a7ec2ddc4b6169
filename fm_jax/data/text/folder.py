"""Plain text and JSON-lines files in folders.

A split is a folder of its name, or the files whose names start with it (`train/…`, `train.jsonl`, `train-00001.txt`).
If no file is named after a split, documents are assigned by a hash of file and line: 90 % train, 5 % validation,
5 % test.
"""

import hashlib
from pathlib import Path

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.errors import DataError

MAX_LINE = 10_000_000  # bytes; a longer line is a damaged file far more often than a document
_SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test")
_SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


class TextFiles:
    """One document per file (`*.txt`, `*.md`, `*.rst`, or `path` itself if it is a file)."""

    def __init__(self, path: Path, split: str, here: str) -> None:
        self._root, files, divided = _find(path, here, (".txt", ".md", ".rst"))
        self._files = files if divided else [file for file in files if _in(split, self._name(file))]
        _check_some(len(self._files), path, here, len(files), "files")
        self.fingerprint = _fingerprint("text", split, self._root, self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        file = self._files[index]
        data = _read(file)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise DataError(f"{file}:{line}: not UTF-8 text (byte {error.start}: {data[error.start]:#04x})") from None
        if not text.strip():
            raise DataError(f"{file} is empty; remove it or add text")
        return text

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()


class JsonLines:
    """One document per line (`*.jsonl`, `*.json`, or `path` itself if it is a file); blank lines are skipped.

    Opening reads every file once, to index the lines.
    """

    def __init__(self, path: Path, split: str, here: str, field: str) -> None:
        root, self._files, divided = _find(path, here, (".jsonl", ".json"))
        self._field = field
        parts, total = [], 0
        for number, file in enumerate(self._files):
            starts, lines = _lines(file)
            total += len(starts)
            if not divided:
                name = file.relative_to(root).as_posix()
                mine = np.array([_in(split, f"{name}:{line}") for line in lines.tolist()], bool)
                starts, lines = starts[mine], lines[mine]
            parts.append(np.stack([np.full(len(lines), number), starts, lines]))
        self._index = np.concatenate(parts, axis=1)  # [3, N]: file, byte, line
        _check_some(len(self), path, here, total, "lines")
        self.fingerprint = _fingerprint(f"jsonl-{field}", split, root, self._files)

    def __len__(self) -> int:
        return self._index.shape[1]

    def __getitem__(self, index: int) -> str:
        number, start, line = (int(x) for x in self._index[:, index])
        file = self._files[number]
        with open(file, "rb") as stream:
            stream.seek(start)
            raw = stream.readline(MAX_LINE + 1)
        where = f"{file}:{line}"
        if len(raw) > MAX_LINE:
            raise DataError(f"{where}: the line is longer than {MAX_LINE} bytes")
        record = json_file.parse(raw, where, DataError, halves=True)
        if not isinstance(record, dict) or self._field not in record:
            has = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{where}: no field {self._field!r} (the line has {has})")
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {self._field!r} is {type(text).__name__}, not text")
        return text.encode("utf-8", "replace").decode()  # JSON may spell lone surrogates


def _find(path: Path, here: str, suffixes: tuple[str, ...]) -> tuple[Path, list[Path], bool]:
    """Return (root, files in a stable order, whether these files are already the split)."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_file():
        return path.parent, [path], False
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise DataError(f"{path} has no {' or '.join('*' + suffix for suffix in suffixes)} files")
    named = {file: file.relative_to(path).parts[0] for file in files}
    if any(_named(top, name) for top in named.values() for name in (*_SPLIT_NAMES, here)):
        mine = [file for file, top in named.items() if _named(top, here)]
        if not mine:
            tops = ", ".join(sorted(set(named.values()))[:8])
            raise DataError(f"{path} has no folder or file named after the split {here!r} (it contains {tops})")
        return path, mine, True
    return path, files, False


def _named(top: str, name: str) -> bool:
    """Return whether a file or folder is named after a split: train, train.txt, train-00001.txt, not trainees.txt."""
    return top == name or (top.startswith(name) and not top[len(name)].isalnum())


def _lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the start byte and the line number of each line that is not blank, both int64 [N]."""
    starts, numbers, position = [], [], 0
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    return np.array(starts, np.int64), np.array(numbers, np.int64)


def _in(split: str, name: str) -> bool:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    low, high = _SHARES[split]
    return low <= share < high


def _check_some(count: int, path: Path, here: str, total: int, unit: str) -> None:
    if not total:
        raise DataError(f"{path} is empty")
    if not count:
        raise DataError(
            f"none of the {total} {unit} of {path} fall into split {here!r}; "
            "sort them into folders train, validation and test"
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _fingerprint(kind: str, split: str, root: Path, files: list[Path]) -> str:
    """Hash the files' names, sizes and modification times; hashing a large corpus itself would take minutes."""
    digest = hashlib.sha256(f"{kind}\0{split}\0".encode())
    for file in files:
        info = file.stat()
        digest.update(f"{file.relative_to(root).as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
    return f"{kind}-{split}-{digest.hexdigest()[:16]}"
