"""A labelled task made of the running Python's own text: name the package that a docstring belongs to.

Ten packages that CPython 3.11 to 3.14 all have, that no distribution packages apart (so not tkinter and idlelib), and
that hold at least 60 docstrings of six words or more in at least three modules. Modules, not docstrings, are divided
into train, validation and test, so a score measures what is known of the package and not of a neighbouring method;
and the division is the corpus's own, so a model pretrained on its train split has seen no docstring of the test.

The label is not printed in the text: see `masked_docstrings`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data import standard_library
from fm_jax.data.masked_docstrings import CLASSES


@dataclass(frozen=True)
class Examples:
    """Texts and their labels: indices into `classes`."""

    texts: tuple[str, ...]
    labels: np.ndarray  # [N] int32
    modules: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES
    second: tuple[str, ...] = ()  # of pairs of texts, the second ones

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Return the examples of these rows, in this order."""
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
    """Read one split of the task, building it (seconds, once a Python version) where it is not there yet.

    Raises:
        DataError: an unknown split, or a Python without its library's sources.
    """
    from fm_jax.data import python_docs

    if split not in standard_library.SPLITS:
        raise DataError(f"the docstring task has no split {split!r}; it has {', '.join(standard_library.SPLITS)}")
    rows = python_docs.rows(python_docs.build(data_dir, "docstrings"), split)
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
            raise DataError(f"{per_class} labels a class asked for, but {name} has only {len(mine)} examples")
        rows += mine[:per_class].tolist()
    return examples.take(rows)
