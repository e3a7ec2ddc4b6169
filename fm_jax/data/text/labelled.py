"""Labelled texts, or pairs of texts, for classification: the built-in docstring task, or a folder of JSON lines."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.python_docs import docstrings, library
from fm_jax.data.python_docs.docstrings import Examples
from fm_jax.data.text import folder


@dataclass(frozen=True)
class Config:
    """Where labelled texts come from."""

    path: Path | None = None  # folder with train, validation and test .jsonl; none: the docstring task
    text: str = "text"  # field with the text
    second: str = ""  # field with the second text, for pairs
    label: str = "label"  # field with the label, any string


@dataclass(frozen=True)
class Task:
    """Three splits, and the class names that labels index."""

    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples


def load(cfg: Config, data_dir: Path) -> Task:
    """Read all three splits; the classes of a folder are its training labels in sorted order.

    Raises:
        ConfigError: a second text was requested of the docstring task.
        DataError: a split is missing or empty, or has a label that the training split does not have.
    """
    if cfg.path is None and cfg.second:
        raise ConfigError(f"data.second {cfg.second} needs data.path; the docstring task has no second texts")
    if cfg.path is None:
        train, validation, test = (docstrings.load(split, data_dir) for split in library.SPLITS)
        return Task(docstrings.CLASSES, train, validation, test)
    texts = {split: _column(cfg.path, split, cfg.text) for split in library.SPLITS}
    labels = {split: _column(cfg.path, split, cfg.label) for split in library.SPLITS}
    second = {split: _column(cfg.path, split, cfg.second) if cfg.second else () for split in library.SPLITS}
    classes = tuple(sorted(set(labels["train"])))
    for split, names in labels.items():
        if unknown := sorted(set(names) - set(classes)):
            raise DataError(f"{cfg.path}: {split} has the label {unknown[0]!r}, which no training text has")
    number = {name: index for index, name in enumerate(classes)}
    train, validation, test = (
        Examples(
            texts=texts[split],
            labels=np.array([number[name] for name in labels[split]], np.int32),
            modules=("",) * len(texts[split]),
            classes=classes,
            second=second[split],
        )
        for split in library.SPLITS
    )
    return Task(classes, train, validation, test)


def _column(path: Path, split: str, field: str) -> tuple[str, ...]:
    lines = folder.JsonLines(path, split, split, field)
    return tuple(lines[index] for index in range(len(lines)))
