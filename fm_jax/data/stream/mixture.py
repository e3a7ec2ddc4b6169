"""Several sources as one stream, in fixed proportions."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream.source import Source


@dataclass(frozen=True)
class Mixture:
    """Draw from several sources in proportion to their weights; each is shuffled and repeated independently.

    After any n rows each source has given n × its share, to within a few rows; weights do not hold only on average.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise ConfigError(
                f"a mixture of {len(self.sources)} sources needs as many weights, not {len(self.weights)}"
            )
        if not all(np.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ConfigError(f"a mixture's weights must be above 0, not {self.weights}")


def parts(source: Source | Mixture) -> tuple[tuple[Source, ...], tuple[float, ...]]:
    """Return the sources and weights of a mixture, or of a single source."""
    return (source.sources, source.weights) if isinstance(source, Mixture) else ((source,), (1.0,))


def fingerprint(source: Source | Mixture) -> str:
    """Return a fingerprint that changes with any row of any source and with the weights."""
    sources, weights = parts(source)
    return "+".join(f"{weight:g}×{member.fingerprint}" for member, weight in zip(sources, weights, strict=True))


def order(source: Source | Mixture, seed: int) -> Any:
    """Return the endless order of rows as a `grain.MapDataset` of (source, row), a pure function of the seed.

    Every pass over a source has a new shuffle. Only indices are shuffled: a row is read when its batch is.
    """
    import grain

    sources, weights = parts(source)
    streams = []
    for number, member in enumerate(sources):
        if not len(member):
            raise DataError(f"{member.name} is empty")
        # Two sources of equal length need different shuffles, and Grain takes 32-bit seeds.
        own = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
        rows = grain.MapDataset.range(len(member)).seed(own).shuffle()
        streams.append(rows.map(_Tag(number)).repeat())
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights=weights)


@dataclass(frozen=True)
class _Tag:
    """Row -> (index of its source, row)."""

    number: int

    def __call__(self, row: int) -> tuple[int, int]:
        return self.number, int(row)
