"""A classification task from the running Python's own docstrings: predict the package a docstring belongs to.

The classes are ten packages that CPython 3.11 to 3.14 all have, that every distribution includes (so not tkinter and
idlelib), and that have at least 60 docstrings of six words or more in at least three modules. Modules, not docstrings,
are split into train, validation and test, so a score measures knowledge of the package and not of a neighbouring
method. The pretraining corpus has the same split, so a model pretrained on its train split has seen no test docstring.

The text does not contain the label: see `masking`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.python_docs import library
from fm_jax.data.python_docs.masking import CLASSES


@dataclass(frozen=True)
class Examples:
    """Texts and their labels: indices into `classes`."""

    texts: tuple[str, ...]
    labels: np.ndarray  # [N] int32
    modules: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES
    second: tuple[str, ...] = ()  # second texts, for pairs

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Return the examples of these rows [n], in this order."""
        return replace(
            self,
            texts=tuple(self.texts[i] for i in rows),
            labels=self.labels[np.asarray(rows, int)],
            modules=tuple(self.modules[i] for i in rows),
            second=tuple(self.second[i] for i in rows) if self.second else (),
        )

    def counts(self) -> dict[str, int]:
        """Return the number of examples of each class."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))


def load(split: str, data_dir: Path) -> Examples:
    """Read one split of the task; build it first if missing (seconds, once per Python version).

    Raises:
        DataError: an unknown split, or a Python installed without the sources of its standard library.
    """
    from fm_jax.data.python_docs import dataset

    if split not in library.SPLITS:
        raise DataError(f"the docstring task has no split {split!r}; it has {', '.join(library.SPLITS)}")
    rows = dataset.rows(dataset.build(data_dir, "docstrings"), split)
    return Examples(
        texts=tuple(row["text"].decode() for row in rows),
        labels=np.array([row["label"] for row in rows], np.int32),
        modules=tuple(row["module"].decode() for row in rows),
    )


def few(examples: Examples, per_class: int, *, seed: int) -> Examples:
    """Draw `per_class` examples of every class; a larger draw with the same seed contains the smaller ones.

    Raises:
        DataError: a class has fewer examples than asked for.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    rows: list[int] = []
    for label, name in enumerate(examples.classes):
        mine = order[examples.labels[order] == label]
        if len(mine) < per_class:
            raise DataError(f"cannot draw {per_class} examples per class: {name} has only {len(mine)}")
        rows += mine[:per_class].tolist()
    return examples.take(rows)
