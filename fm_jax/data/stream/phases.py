"""Streams of batches in sequence: BERT trains on 128 tokens for 90 % of its steps, then on 512."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream.loader import Batches, HostBatch


@dataclass(frozen=True)
class Phases:
    """Streams in sequence, each from its own batch 0; a jitted step recompiles when shapes change."""

    streams: tuple[Batches, ...]
    starts: tuple[int, ...]  # the step at which each stream begins; the first is 0

    def __post_init__(self) -> None:
        """Refuse phases that are not in order."""
        if len(self.streams) != len(self.starts) or self.starts[:1] != (0,) or list(self.starts) != sorted(self.starts):
            raise ConfigError(
                f"{len(self.streams)} phases start at steps {self.starts}; give one ascending start per phase, from 0"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the whole: it changes with any stream and any start."""
        text = "/".join(f"{start}:{phase.fingerprint}" for start, phase in zip(self.starts, self.streams, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state(self, next_batch: int) -> dict[str, Any]:
        """Return the stream's state for a checkpoint."""
        return {"next_batch": next_batch, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """Return the index of the next batch from a checkpoint's state.

        Raises:
            DataError: the state belongs to other phases.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the checkpoint was made with data stream {state.get('fingerprint')}, this is {self.fingerprint}; "
                "data, batch_size, seed and phases must be the same to resume"
            )
        return int(state["next_batch"])

    def iterate(self, start: int = 0) -> Iterator[HostBatch]:
        """Yield this host's rows of global batches start, start + 1, … without end."""
        for number, (begin, stream) in enumerate(zip(self.starts, self.streams, strict=True)):
            stop = self.starts[number + 1] if number + 1 < len(self.starts) else None
            if stop is not None and start >= stop:
                continue
            reader = stream.iterate(start - begin)
            try:
                while stop is None or start < stop:
                    yield next(reader)
                    start += 1
            finally:
                reader.close()  # type: ignore[attr-defined]  # a generator: its threads end here
