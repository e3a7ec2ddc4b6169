"""Labelled texts, or pairs of texts, for classification: the built-in docstring task, or files of rows.

A label is text, a whole number (1, 1.0), or true and false; all labels are of one kind. The classes are the training
labels: numbers from the smallest to the largest, false before true, text by its characters.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import table
from fm_jax.data.python_docs import docstrings, library
from fm_jax.data.python_docs.docstrings import Examples
from fm_jax.data.text import folder
from fm_jax.data.text.folder import Placed

Label = str | int | bool

_KINDS = {str: "text", int: "a number", bool: "true or false"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?")  # not 007, which is a name


@dataclass(frozen=True)
class Config:
    """Where labelled texts come from."""

    path: Path | None = None  # folder with train, validation and test files of rows; none: the docstring task
    text: str = "text"  # field with the text
    second: str = ""  # field with the second text, for pairs
    label: str = "label"  # field with the label: text, a whole number, or true and false


@dataclass(frozen=True)
class Task:
    """Three splits, and the class names that labels index."""

    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples


def load(cfg: Config, data_dir: Path) -> Task:
    """Read all three splits; the classes are the training labels, in the order that the module states.

    Raises:
        ConfigError: a second text was requested of the docstring task.
        DataError: a split is missing or empty; a label that is no class, is of another kind than the others, or is
            missing in the training split.
    """
    if cfg.path is None and cfg.second:
        raise ConfigError(f"data.second {cfg.second} needs data.path; the docstring task has no second texts")
    if cfg.path is None:
        train, validation, test = (docstrings.load(split, data_dir) for split in library.SPLITS)
        return Task(docstrings.CLASSES, train, validation, test)
    fields = (cfg.text, cfg.second, cfg.label) if cfg.second else (cfg.text, cfg.label)
    splits = {split: folder.rows(cfg.path, split, fields) for split in library.SPLITS}
    labels = _labels(splits, cfg.label)
    number = {label: index for index, label in enumerate(sorted(set(labels["train"])))}
    for split, rows in splits.items():
        for row, label in zip(rows, labels[split], strict=True):
            if label not in number:
                raise DataError(f"{row.where}: {split} has the label {_name(label)!r}, which no training text has")
    classes = tuple(map(_name, number))
    train, validation, test = (
        Examples(
            texts=_texts(rows, cfg.text),
            labels=np.array([number[label] for label in labels[split]], np.int32),
            modules=("",) * len(rows),
            classes=classes,
            second=_texts(rows, cfg.second) if cfg.second else (),
        )
        for split, rows in splits.items()
    )
    return Task(classes, train, validation, test)


def _texts(rows: Sequence[Placed], field: str) -> tuple[str, ...]:
    return tuple(folder.text_of(row.fields, field, row.where) for row in rows)


def _name(label: Label) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def _labels(splits: Mapping[str, Sequence[Placed]], field: str) -> dict[str, list[Label]]:
    """Return the labels of all splits, which are of one kind.

    Raises:
        DataError: a value that is no label, or two kinds of labels; the message names a row of each.
    """
    values = {split: [table.value(row.fields, field, row.where) for row in rows] for split, rows in splits.items()}
    spelt = {value for column in values.values() for value in column if isinstance(value, str)}
    # CSV has no types: a column in which all is a number is one of numbers
    numbers = all(row.form == "csv" for rows in splits.values() for row in rows) and all(map(_NUMBER.fullmatch, spelt))
    labels: dict[str, list[Label]] = {}
    first: tuple[str, Label] | None = None
    for split, rows in splits.items():
        labels[split] = []
        for row, value in zip(rows, values[split], strict=True):
            label = _label(float(value) if numbers else value, field, row.where)
            first = first or (row.where, label)
            if type(label) is not type(first[1]):
                raise DataError(
                    f"{row.where}: the label {label!r} is {_KINDS[type(label)]}, but {first[1]!r} at {first[0]} is "
                    f"{_KINDS[type(first[1])]}; write all labels as one kind"
                )
            labels[split].append(label)
    return labels


def _label(value: Any, field: str, where: str) -> Label:
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"{where}: the label {value!r} is a fraction; regression is not supported here, labels must be classes"
            )
        return int(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: field {field!r} is empty; every text needs a label")
    if isinstance(value, bool | int):
        return value
    if not isinstance(value, str | bytes):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}; a label is text, a whole number or true")
    return table.text(value, field, where)
