"""Parallel text: rows for an encoder that reads the source and a decoder that predicts the target.

Texts come from memory, from files of rows with two fields (JSON lines, CSV, Parquet), or from files aligned line by
line (`train.en`, `train.de`, `dev.en.gz`, …). A row is {"source": int32 [S], "source_length": int32 [], "tokens",
"targets": int32 [T], "weights": float32 [T]}. Source and target each end with the end token. The decoder's input is the
targets shifted right by one, with the padding token as the start token (T5 has no other; Raffel et al. 2020).
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import files, packed, table
from fm_jax.data.text import folder
from fm_jax.data.text.layout import Row
from fm_jax.data.text.tokenizer import Tokenizer


class Texts(Protocol):
    """Texts by random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclass(frozen=True)
class Parallel:
    """Sentences and their translations, row by row."""

    sources: Texts
    targets: Texts
    name: str = "pairs"
    fingerprint: str = ""  # changes with the texts; by default their hash

    def __post_init__(self) -> None:
        """Refuse sides of different lengths."""
        if len(self.sources) != len(self.targets) or not len(self.sources):
            raise DataError(
                f"{self.name}: {len(self.sources)} sources and {len(self.targets)} targets; "
                "both need the same number, at least 1"
            )
        if not self.fingerprint:
            digest = hashlib.sha256()
            for row in range(len(self)):
                digest.update(f"{self.sources[row]}\n{self.targets[row]}\n".encode())
            object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.sources)

    def head(self, count: int) -> "Parallel":
        """Return the first `count` pairs in memory, or all if there are fewer."""
        rows = range(min(count, len(self)))
        return Parallel([self.sources[i] for i in rows], [self.targets[i] for i in rows], self.name)


class Pairs:
    """Pairs truncated or padded to one shape, tokenised when they are read.

    A truncated source still ends with the end token. A truncated target does not: the model must not learn to stop
    there.
    """

    def __init__(
        self, pairs: Parallel, tokenizer: Tokenizer, *, source_length: int, target_length: int, prefix: str = ""
    ) -> None:
        """Set S, T and the prefix of every source (T5's task name)."""
        if source_length < 2 or target_length < 2:
            raise ConfigError(
                f"source_length and target_length must be at least 2, not {source_length} and {target_length}"
            )
        self._pairs, self._tokenizer, self._prefix = pairs, tokenizer, prefix
        self._source, self._target = source_length, target_length
        self._end, self._pad = tokenizer.end_id, tokenizer.pad_id
        self.name = pairs.name
        parts = f"{pairs.fingerprint}/{tokenizer.fingerprint}/{prefix}"
        digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
        self.fingerprint = f"pairs-{source_length}-{target_length}-{digest}"
        limit = tokenizer.vocab_size
        self.limits: Mapping[str, int] = {"source": limit, "tokens": limit, "targets": limit}

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source, target = self._ids(index)
        row = read_side([source[:-1]], self._source, end_id=self._end, pad_id=self._pad)
        fields = {name: value[0] for name, value in row.items()}
        used = min(len(target), self._target)
        for name in ("tokens", "targets"):
            fields[name] = np.full(self._target, self._pad, np.int32)
        fields["targets"][:used], fields["tokens"][1:used] = target[:used], target[: used - 1]
        return fields | {"weights": (np.arange(self._target) < used).astype(np.float32)}

    def cut_share(self, most: int = 2000) -> float:
        """Return the share of the first `most` pairs that are truncated."""
        rows = range(min(most, len(self)))
        return float(np.mean([len(s) > self._source or len(t) > self._target for s, t in map(self._ids, rows)]))

    def _ids(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source, target = self._pairs.sources[index], self._pairs.targets[index]
        if not source.strip() or not target.strip():
            raise DataError(f"the {'target' if source.strip() else 'source'} is empty; remove the pair")
        encoded = self._tokenizer.encode_batch([self._prefix + source, target])
        return np.append(encoded[0], np.int32(self._end)), np.append(encoded[1], np.int32(self._end))


def read_side(ids: Sequence[np.ndarray], length: int, *, end_id: int, pad_id: int) -> Row:
    """Return the encoder input of N tokenised texts: {"source": int32 [N, S], "source_length": int32 [N]}.

    Each text is truncated to S - 1 tokens and ends with the end token.
    """
    source, lengths = np.full((len(ids), length), pad_id, np.int32), np.zeros(len(ids), np.int32)
    for number, text in enumerate(ids):
        kept = min(len(text), length - 1)
        source[number, :kept], source[number, kept], lengths[number] = text[:kept], end_id, kept + 1
    return {"source": source, "source_length": lengths}


def load(
    path: Path,
    split: str,
    *,
    fields: tuple[str, str] = ("source", "target"),
    languages: tuple[str, str] = ("en", "de"),
) -> Parallel:
    """Open one split of a folder; texts are read on demand.

    Args:
        path: a folder with aligned files `SPLIT.en` and `SPLIT.de`, or with files of rows (see `folder.column`).
        split: train, validation or test; its files may have another of the names in `files.CALLED`.
        fields: source and target field of rows; `translation.en` is the field of a field.
        languages: source and target suffix of aligned files.

    Raises:
        DataError: missing, empty or misaligned files; reading a damaged text raises it too, naming file and line.
    """
    aligned = [_aligned(path, split, language) for language in languages]
    if not any(aligned):
        both = [folder.column(path, split, field) for field in fields]
        return Parallel(both[0], both[1], f"{path}/{split}", f"{both[0].fingerprint}-{both[1].fingerprint}")
    for file, language in zip(aligned, languages, strict=True):
        if file is None:
            raise DataError(
                f"{path} has {' and '.join(file.name for file in aligned if file)}, but no {split}.{language}"
            )
    first, second = (_Lines(file) for file in aligned if file)
    if len(first) != len(second):
        raise DataError(
            f"{first.file} has {len(first)} lines and {second.file} has {len(second)}; "
            "line n of one must be the translation of line n of the other"
        )
    return Parallel(first, second, f"{path}/{split}", f"{first.fingerprint}-{second.fingerprint}")


def _aligned(path: Path, split: str, language: str) -> Path | None:
    names = [f"{alias}.{language}{packing}" for alias in files.CALLED[split] for packing in ("", *packed.SUFFIXES)]
    there = [path / name for name in names if os.path.lexists(path / name)]
    if len(there) > 1:
        both = f"{there[0].name} and {there[1].name}"
        raise DataError(f"{path} has {both}, each of which may be the {split} split; move or rename one")
    return there[0] if there else None


class _Lines:
    """The lines of one file by random access, including empty ones; a packed file is unpacked once."""

    def __init__(self, file: Path) -> None:
        self.file, status = file, files.check(file)
        if len(self._bounds) == 1:
            raise DataError(f"{file} is empty")
        mark = f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}"
        self.fingerprint = hashlib.sha256(mark.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        spool, bounds = self._opened
        start, stop = int(bounds[index]), int(bounds[index + 1])
        try:
            if spool is not None:
                raw = spool.read(start, stop)
            else:
                with open(self.file, "rb") as stream:
                    stream.seek(start)
                    raw = stream.read(stop - start)
        except OSError as error:
            raise files.failed(error, f"cannot read {self.file}") from error
        try:
            return raw.decode("utf-8-sig" if index == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise table.not_utf8(self.file, index + 1, start, raw, error) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    @cached_property
    def _opened(self) -> tuple[packed.Spool | None, np.ndarray]:
        """The unpacked lines, and where each starts and the last ends: int64 [N + 1]."""
        spool = packed.Spool() if packed.is_packed(self.file) else None
        bounds = [0]
        with packed.reading(self.file) as stream:
            for _, start, line in table.lines(stream, self.file):
                bounds.append(start + len(line))
                if spool is not None:
                    spool.append(line)
        return spool, np.array(bounds, np.int64)

    @property
    def _bounds(self) -> np.ndarray:
        return self._opened[1]
