"""A part of a source: the rows of one draw of labels, or every so manieth."""

import hashlib
from collections.abc import Mapping

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.mixture import Drawn, Source


class Rows:
    """Some rows of a source, in the order given; drawn anew at each visit where the source's are (`mixture.Drawn`)."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        """Keep the numbers of the rows; a row may come more than once.

        Raises:
            DataError: a row that the source has not.
        """
        self._source, self._rows = source, np.asarray(rows, np.int64)
        wrong = self._rows[(self._rows < 0) | (self._rows >= len(source))]
        if len(wrong):
            raise DataError(f"{source.name} has no row {wrong[0]}; it has {len(source)}")
        digest = hashlib.sha256(self._rows.tobytes()).hexdigest()[:16]
        self.name, self.fingerprint = f"{source.name}, {len(self._rows)} rows", f"{source.fingerprint}[{digest}]"
        self.limits: Mapping[str, int] = source.limits

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._source[int(self._rows[index])]

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the source's own draw of one row, or the row itself where nothing is drawn."""
        row = int(self._rows[index])
        return self._source.draw(row, rng) if isinstance(self._source, Drawn) else self._source[row]


def spread(source: Source, count: int) -> Rows:
    """Return at most `count` rows, evenly over the source: one sorted by class gives some of each."""
    total = len(source)
    return Rows(source, np.arange(total) if count >= total else np.arange(count) * total // count)
