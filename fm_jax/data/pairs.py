"""Parallel text: rows for an encoder that reads the source and a decoder that writes the target.

Texts come from memory, from a folder of JSON lines with two fields, or from aligned files, line by line the same
sentence (`train.en`, `train.de`, `validation.en`, …). A row is {"source": int32 [S], "source_length": int32 [],
"tokens", "targets": int32 [T], "weights": float32 [T]}: source and target each close with the end token, and the
decoder reads the targets one place to the right, behind the padding token (Raffel et al. 2020: T5 has no other start).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import folder
from fm_jax.data.text import Row
from fm_jax.data.tokenizer import Tokenizer


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
    fingerprint: str = ""  # changes with the texts; made of them where it is not given

    def __post_init__(self) -> None:
        """Refuse sides of different lengths."""
        if len(self.sources) != len(self.targets) or not len(self.sources):
            raise DataError(
                f"{self.name}: {len(self.sources)} sources and {len(self.targets)} targets; there must be some, and as "
                "many"
            )
        if not self.fingerprint:
            digest = hashlib.sha256()
            for row in range(len(self)):
                digest.update(f"{self.sources[row]}\n{self.targets[row]}\n".encode())
            object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.sources)

    def head(self, count: int) -> "Parallel":
        """Return the first `count` pairs, in memory, or all where there are fewer."""
        rows = range(min(count, len(self)))
        return Parallel([self.sources[i] for i in rows], [self.targets[i] for i in rows], self.name)


class Pairs:
    """Tokenised pairs, cut or padded to one shape; tokenised when they are read.

    A source that is too long loses its end but not the end token. A target that is too long loses both: the model must
    not learn to stop there.
    """

    def __init__(
        self, pairs: Parallel, tokenizer: Tokenizer, *, source_length: int, target_length: int, prefix: str = ""
    ) -> None:
        """Take S and T, and what every source is preceded by: T5's name of the task."""
        if source_length < 2 or target_length < 2:
            raise ConfigError(f"a side of at least 2 tokens is needed, not {source_length} and {target_length}")
        self._pairs, self._tokenizer, self._prefix = pairs, tokenizer, prefix
        self._source, self._target = source_length, target_length
        self._end, self._pad = tokenizer.end_id, tokenizer.pad_id
        self.name = pairs.name
        told = f"{pairs.fingerprint}/{tokenizer.fingerprint}/{prefix}"
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
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
        found = {name: value[0] for name, value in row.items()}
        used = min(len(target), self._target)
        for name in ("tokens", "targets"):
            found[name] = np.full(self._target, self._pad, np.int32)
        found["targets"][:used], found["tokens"][1:used] = target[:used], target[: used - 1]
        return found | {"weights": (np.arange(self._target) < used).astype(np.float32)}

    def cut_share(self, most: int = 2000) -> float:
        """Return the share of the first `most` pairs that lose tokens for want of room."""
        rows = range(min(most, len(self)))
        return float(np.mean([len(s) > self._source or len(t) > self._target for s, t in map(self._ids, rows)]))

    def _ids(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source, target = self._pairs.sources[index], self._pairs.targets[index]
        if not source.strip() or not target.strip():
            raise DataError(f"the {'target' if source.strip() else 'source'} is empty; remove the pair")
        found = self._tokenizer.encode_batch([self._prefix + source, target])
        return np.append(found[0], np.int32(self._end)), np.append(found[1], np.int32(self._end))


def read_side(ids: Sequence[np.ndarray], length: int, *, end_id: int, pad_id: int) -> Row:
    """Return what an encoder reads of tokenised texts: {"source": int32 [N, S], "source_length": int32 [N]}.

    Each text is cut to S - 1 tokens and closed with the end token.
    """
    source, lengths = np.full((len(ids), length), pad_id, np.int32), np.zeros(len(ids), np.int32)
    for number, one in enumerate(ids):
        kept = min(len(one), length - 1)
        source[number, :kept], source[number, kept], lengths[number] = one[:kept], end_id, kept + 1
    return {"source": source, "source_length": lengths}


def load(
    path: Path,
    split: str,
    *,
    fields: tuple[str, str] = ("source", "target"),
    languages: tuple[str, str] = ("en", "de"),
) -> Parallel:
    """Open one split of a folder; texts are read when they are asked for.

    Args:
        path: a folder with aligned files `SPLIT.en` and `SPLIT.de`, or with JSON lines as `data/folder.py` finds them.
        split: train, validation or test.
        fields: of JSON lines, source and target.
        languages: the ends of aligned files' names, source and target.

    Raises:
        DataError: missing, empty, or files that are not aligned; reading a text raises it too, naming file and line.
    """
    files = [path / f"{split}.{language}" for language in languages]
    if not any(file.exists() for file in files):
        lines = [folder.JsonLines(path, split, split, field) for field in fields]
        return Parallel(lines[0], lines[1], f"{path}/{split}", f"{lines[0].fingerprint}-{lines[1].fingerprint}")
    first, second = (_Lines(file) for file in files)
    if len(first) != len(second):
        raise DataError(
            f"{files[0]} has {len(first)} lines and {files[1]} has {len(second)}: line by line they must be the same "
            "sentence"
        )
    return Parallel(first, second, f"{path}/{split}", f"{first.fingerprint}-{second.fingerprint}")


class _Lines:
    """The lines of one file by random access, empty ones included."""

    def __init__(self, file: Path) -> None:
        self._file, position, starts = file, 0, []
        try:
            with open(file, "rb") as stream:
                for line in stream:
                    starts.append(position)
                    position += len(line)
            changed = file.stat().st_mtime_ns
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        if not starts:
            raise DataError(f"{file} is empty")
        self._starts = np.array(starts, np.int64)
        self.fingerprint = hashlib.sha256(f"{file.name}\0{position}\0{changed}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        with open(self._file, "rb") as stream:
            stream.seek(int(self._starts[index]))
            raw = stream.readline(folder.MAX_LINE + 1)
        if len(raw) > folder.MAX_LINE:
            raise DataError(f"{self._file}:{index + 1}: the line is longer than {folder.MAX_LINE} bytes")
        try:
            return raw.decode("utf-8-sig" if index == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._file}:{index + 1}: not UTF-8 text (byte {error.start} of the line)") from None
