"""Sources of documents: one config, seven kinds, each a sequence of texts with random access.

python_docs   the running Python's own documentation
tfds          a field of a data set of tensorflow-datasets
text          text files: .txt, .md, .rst
jsonl         a field of JSON lines or of a JSON list: .jsonl, .ndjson, .json
csv           a column: .csv, .tsv
parquet       a column: .parquet
tokens        token ids that are ready
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import table
from fm_jax.data.catalogue import line, open_split
from fm_jax.data.python_docs import library
from fm_jax.data.text import folder

SPLITS = library.SPLITS


@dataclass(frozen=True)
class Config:
    """A corpus; which fields are read depends on `kind`."""

    kind: Literal["python_docs", "tfds", "text", "jsonl", "csv", "parquet", "tokens"] = "python_docs"
    name: str = ""  # tfds: name in tensorflow-datasets, such as lm1b or wiki40b/en
    path: Path | None = None  # text, jsonl, csv, parquet, tokens: a folder; all but tokens also take one file
    field: str = "text"  # tfds, jsonl, csv, parquet: the field with the text, or with a conversation ("messages")
    splits: tuple[str, str, str] = ("train", "validation", "test")  # the corpus's names of train, validation and test
    only: tuple[str, ...] = ()  # python_docs: top-level packages and modules to keep; empty: all
    download: bool = False  # tfds: let tensorflow-datasets download and prepare a missing corpus

    def __post_init__(self) -> None:
        if self.kind == "tfds" and not self.name:
            raise ConfigError("kind tfds needs a name, such as lm1b")
        if self.kind in ("text", "jsonl", "csv", "parquet", "tokens") and self.path is None:
            raise ConfigError(f"kind {self.kind} needs a path")

    def here(self, split: str) -> str:
        """Return this corpus's name of a split; tfds allows slices such as train[:99%]."""
        if split not in SPLITS:
            raise DataError(f"the corpus has no split {split!r}; choose {', '.join(SPLITS)}")
        return self.splits[SPLITS.index(split)]


class Documents(Protocol):
    """Texts by random access, and a fingerprint that changes when they change."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def documents(cfg: Config, split: str, data_dir: Path) -> Documents:
    """Open one split of a corpus; documents are read on demand.

    Args:
        cfg: the corpus.
        split: train, validation or test.
        data_dir: directory of prepared tensorflow-datasets corpora, including the built-in one.

    Raises:
        DataError: missing, empty, or not of its kind; reading a damaged document raises it too, naming file and line.
    """
    here = cfg.here(split)
    if cfg.kind == "python_docs":
        return _python_docs(cfg, split, data_dir)
    if cfg.kind == "tfds":
        return _catalogue(cfg, here, data_dir)
    if cfg.kind == "tokens":
        raise DataError(f"{cfg.path} holds tokens, not documents; open it with corpus.prepare")
    assert cfg.path is not None
    if cfg.kind == "text":
        return folder.TextFiles(cfg.path, split, own=here)
    return folder.column(cfg.path, split, cfg.field, suffixes=_suffixes(cfg), own=here)


def fingerprint(cfg: Config, split: str, data_dir: Path) -> str:
    """Return the fingerprint of `documents(...)`, without building the corpus where possible."""
    if cfg.kind == "python_docs":
        return f"python_docs-{library.fingerprint(cfg.only)}-{split}"
    if cfg.path is None or cfg.kind == "tokens":
        return documents(cfg, split, data_dir).fingerprint
    if cfg.kind == "text":
        return folder.text_fingerprint(cfg.path, split, own=cfg.here(split))
    return folder.column_fingerprint(cfg.path, split, cfg.field, suffixes=_suffixes(cfg), own=cfg.here(split))


def _suffixes(cfg: Config) -> tuple[str, ...]:
    """Return the suffixes of a kind of rows; one file is refused if its name says another kind.

    Raises:
        DataError: `path` is a file of another kind.
    """
    assert cfg.path is not None and cfg.kind in table.SUFFIXES
    if cfg.path.name.lower().endswith(folder.ROWS) and cfg.path.is_file() and table.form(cfg.path) != cfg.kind:
        raise DataError(f"{cfg.path} is not of kind {cfg.kind}; set kind to {table.form(cfg.path)}")
    if cfg.kind != "jsonl" and cfg.path.is_file() and not cfg.path.name.lower().endswith(table.SUFFIXES[cfg.kind]):
        raise DataError(f"{cfg.path} is not of kind {cfg.kind}; its name must end in {table.SUFFIXES[cfg.kind][0]}")
    return table.SUFFIXES[cfg.kind]


class _Records:
    """One text field of a tensorflow-datasets split."""

    def __init__(self, rows: Sequence[Any], field: str, name: str, mark: str) -> None:
        self._rows, self._field, self._name, self.fingerprint = rows, field, name, mark

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        try:
            text = self._rows[index][self._field]
            return text.decode() if isinstance(text, bytes) else str(text)
        except IndexError:
            raise
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name}: record {index} is not UTF-8 text: {error}") from error
        except Exception as error:  # a damaged file: the reader raises RuntimeError with C++ text
            raise DataError(f"{self._name}: cannot read record {index}: {line(error)}") from error


def _python_docs(cfg: Config, split: str, data_dir: Path) -> Documents:
    from fm_jax.data.python_docs import dataset

    rows = dataset.rows(dataset.build(data_dir, "modules", only=cfg.only), split)
    return _Records(rows, "text", f"python_docs/{split}", fingerprint(cfg, split, data_dir))


def _catalogue(cfg: Config, here: str, data_dir: Path) -> Documents:
    info, rows = open_split(cfg.name, here, data_dir, fields=(cfg.field,), download=cfg.download)
    return _Records(rows, cfg.field, f"{cfg.name}/{here}", f"{info.full_name}-{here}-{cfg.field}-{len(rows)}")
