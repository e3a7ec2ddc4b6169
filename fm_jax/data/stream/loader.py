"""Batches as a pure function of (seed, step), for any number of hosts, workers and threads.

Global batch `step` is rows step·B … step·B + B − 1 of an endless shuffled order. Host h of H reads rows
h·B/H … (h+1)·B/H − 1 of it, so the global array does not depend on the number of hosts. The only state is the index of
the next batch, so resuming costs nothing.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError, ResourceError
from fm_jax.data.stream import mixture
from fm_jax.data.stream.mixture import Mixture
from fm_jax.data.stream.source import Drawn, Source, Staged

HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batches:
    """Endless shuffled batches; every row of the source is used once before any is repeated."""

    source: Source | Mixture
    batch_size: int  # rows of the global batch, summed over all hosts
    seed: int = 0
    host: int = 0
    hosts: int = 1
    workers: int = 0  # processes that read ahead; 0: threads of this process read
    threads: int = 2  # threads that read ahead, here or in each worker; 0: read on demand (only without workers)
    repeats: int = 1  # augmentations of one source row within a batch (repeated augmentation, Hoffer et al. 2020)

    def __post_init__(self) -> None:
        _check_hosts(self.batch_size, self.host, self.hosts)
        if self.workers < 0 or self.threads < 0:
            raise ConfigError(f"workers ({self.workers}) and threads ({self.threads}) must be 0 or more")
        if not 1 <= self.repeats <= self.batch_size:
            raise ConfigError(f"repeats must be between 1 and batch_size {self.batch_size}, not {self.repeats}")

    @property
    def fingerprint(self) -> str:
        """Hash of the stream: it depends on data, batch size and seed, not on hosts or workers."""
        text = f"{mixture.fingerprint(self.source)}/{self.batch_size}/{self.seed}"
        text += f"/{self.repeats}" if self.repeats > 1 else ""
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state(self, next_batch: int) -> dict[str, Any]:
        """Return the stream's state for a checkpoint."""
        return {"next_batch": next_batch, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """Return the index of the next batch from a checkpoint's state.

        Raises:
            DataError: the state belongs to another stream.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the checkpoint was made with data stream {state.get('fingerprint')}, this is {self.fingerprint}; "
                "data, batch_size and seed must be the same to resume"
            )
        return int(state["next_batch"])

    def iterate(self, start: int = 0) -> Iterator[HostBatch]:
        """Yield this host's rows of global batches start, start + 1, … without end; closing the iterator stops readers.

        Raises:
            DataError: while iterating: a row is unreadable or has values out of range; the message names both.
            ResourceError: a worker died.
        """
        if start < 0:
            raise ConfigError(f"the first batch must be 0 or later, not {start}")
        rows = self.batch_size // self.hosts
        sources, _ = mixture.parts(self.source)
        if (total := sum(map(len, sources))) < self.batch_size:
            names = ", ".join(source.name for source in sources)
            raise DataError(f"{names}: {total} rows are too few for one batch of {self.batch_size}")
        order = mixture.order(self.source, self.seed)
        return self._read(
            _Reader(sources, order, self.batch_size, self.host * rows, rows, self.seed, self.repeats), start
        )

    def _read(self, reader: "_Reader", start: int) -> Iterator[HostBatch]:
        import grain

        steps = grain.MapDataset.range(start, sys.maxsize).map(reader)
        threads = max(self.threads, 1) if self.workers else self.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        stream = steps.to_iter_dataset(options)
        if self.workers:
            _mark_flags_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        iterator = iter(stream)
        try:
            for batch in iterator:
                # Workers return views of shared memory, which warn when they outlive the readers: copy them.
                yield {name: np.array(value) for name, value in batch.items()} if self.workers else batch
        except RuntimeError as error:
            if "exit code" not in str(error):  # grain's words for a reading process that died
                raise
            raise ResourceError(
                f"a process that reads data died ({' '.join(str(error).split())[:120]}), often for want of memory; "
                "set fewer workers, or 0"
            ) from error
        finally:
            if hasattr(iterator, "close"):
                iterator.close()


@dataclass(frozen=True)
class Epoch:
    """One ordered pass over a source, for evaluation; the last batch is padded with rows of weight 0.

    Every batch has `batch_size` / `hosts` rows, so one compiled step serves all. It can be iterated repeatedly.
    """

    source: Source
    batch_size: int
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        _check_hosts(self.batch_size, self.host, self.hosts)
        if not len(self.source):
            raise DataError(f"{self.source.name} is empty")

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[HostBatch]:
        rows, total = self.batch_size // self.hosts, len(self.source)
        for step in range(len(self)):
            first = step * self.batch_size + self.host * rows
            numbers = range(first, min(first + rows, total))
            # A host without rows left pads with copies of row 0, at weight 0.
            mine = [_row(self.source, number) for number in numbers] or [_row(self.source, 0)]
            batch = _stack(mine, self.source)
            _check_limits(batch, self.source)
            if "weights" not in batch:
                raise DataError(f"{self.source.name} has no field 'weights', so its last batch cannot be padded")
            yield _fill(batch, rows, len(numbers))


@dataclass(frozen=True)
class _Reader:
    """Step -> one host's rows of that global batch; it is pickled to workers."""

    sources: tuple[Source, ...]
    order: Any  # grain.MapDataset of (source, row)
    batch_size: int
    first: int  # this host's rows within a batch
    rows: int
    seed: int
    repeats: int

    def __call__(self, step: int) -> HostBatch:
        begin = step * self.batch_size + self.first
        sources = [source.at(step, self.seed) if isinstance(source, Staged) else source for source in self.sources]
        picked = [self.order[_visited(i, self.repeats)] for i in range(begin, begin + self.rows)]
        rows = [_row(sources[number], row, (self.seed, begin + k)) for k, (number, row) in enumerate(picked)]
        batch = _stack(rows, *sources)
        for number, source in enumerate(sources):
            mine = slice(None) if len(sources) == 1 else [k for k, (n, _) in enumerate(picked) if n == number]
            _check_limits({name: value[mine] for name, value in batch.items()}, source)
        return batch


def _visited(place: int, repeats: int) -> int:
    """Return the index in the order of the row at a place of the repeated stream; no row is its own neighbour.

    Mixing (`mixup.py`) pairs neighbours, and an image mixed with itself is not mixed. So 2 · repeats - 1 rows take
    turns until each was seen `repeats` times; their number is odd so that partners change.
    """
    few = 2 * repeats - 1
    group, within = divmod(place, few * repeats)
    return group * few + within % few


def _row(source: Source, number: int, seed: tuple[int, int] | None = None) -> HostBatch:
    """Read one row, or draw it if the source is random; any error becomes a DataError that names source and row.

    The random generator depends on (seed, place in the endless order): each visit differs, hosts and workers do not
    matter.
    """
    try:
        if seed is not None and isinstance(source, Drawn):
            return source.draw(number, np.random.default_rng((seed[0] % 2**32, seed[1])))
        return source[number]
    except Exception as error:
        raise DataError(f"{source.name}: row {number}: {str(error) or type(error).__name__}") from error


def _stack(rows: list[HostBatch], *sources: Source) -> HostBatch:
    try:
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    except (KeyError, ValueError) as error:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"rows of {names} differ in fields or shapes: {error}") from error


def _check_limits(batch: HostBatch, source: Source) -> None:
    """Refuse ids and labels out of range: indexing on a device would silently clamp them or return NaN."""
    for name, limit in source.limits.items():
        values = batch[name]
        if values.size and (values.min() < 0 or values.max() >= limit):
            wrong = values.min() if values.min() < 0 else values.max()
            raise DataError(f"{source.name}: {name} contains {wrong}, outside 0 … {limit - 1}")


def _fill(batch: HostBatch, rows: int, used: int) -> HostBatch:
    """Pad the batch to `rows` rows with copies of the first row at weight 0."""
    missing = rows - len(batch["weights"])
    batch = {name: np.concatenate([value, np.repeat(value[:1], missing, 0)]) for name, value in batch.items()}
    batch["weights"][used:] = 0
    return batch


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
    if batch_size < 1 or hosts < 1 or batch_size % hosts:
        raise ConfigError(f"batch_size {batch_size} is not divisible by {hosts} hosts")
    if not 0 <= host < hosts:
        raise ConfigError(f"host {host} is not in 0 … {hosts - 1}")


def _mark_flags_as_parsed() -> None:
    """Let Grain start workers from a program that does not use absl's flags (grain 0.2.18 refuses otherwise)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
