"""A subset of a source: chosen rows, or evenly spaced rows."""

import hashlib
from collections.abc import Mapping

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.stream.source import Drawn, Source, Staged


class Rows:
    """Some rows of a source, in the given order; random at each visit if the source's are (`mixture.Drawn`)."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        """Keep the row indices [N]; a row may occur more than once.

        Raises:
            DataError: the source does not have a row.
        """
        self._source, self._rows = source, np.asarray(rows, np.int64)
        wrong = self._rows[(self._rows < 0) | (self._rows >= len(source))]
        if len(wrong):
            raise DataError(f"{source.name} has no row {wrong[0]}; it has {len(source)} rows")
        digest = hashlib.sha256(self._rows.tobytes()).hexdigest()[:16]
        self.name, self.fingerprint = f"{source.name}, {len(self._rows)} rows", f"{source.fingerprint}[{digest}]"
        self.limits: Mapping[str, int] = source.limits

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._source[int(self._rows[index])]

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return a random draw of one row, or the row itself if the source is not random."""
        row = int(self._rows[index])
        return self._source.draw(row, rng) if isinstance(self._source, Drawn) else self._source[row]

    def at(self, step: int, seed: int) -> Source:
        """Return the rows as batch `step` reads them."""
        if not isinstance(self._source, Staged):
            return self
        return Rows(self._source.at(step, seed), self._rows)


def spread(source: Source, count: int) -> Rows:
    """Return at most `count` evenly spaced rows, so that a source sorted by class gives rows of every class."""
    total = len(source)
    return Rows(source, np.arange(total) if count >= total else np.arange(count) * total // count)
