"""Checkpoints of a run: asynchronous, sealed, verified; the last and the best are kept.

A step's folder gets its own name only when it is complete and on disk (`seal.publish`); until then it is written in
`unsealed/`. So a kill or a power cut at any moment leaves earlier steps unchanged:

    DIR/1200/state/           arrays, as Orbax writes them
    DIR/1200/checkpoint.json  data position, metrics, config, versions, revision, names and shapes of the arrays
    DIR/1200/tokenizer/…      what else is needed to open the model, as the run gives it in `files`
    DIR/1200/seal.json        size and sha256 of every file
    DIR/unsealed/             saves in progress, or interrupted ones

It uses Orbax's asynchronous checkpointer, not its CheckpointManager, which names steps before they are on disk, skips
saves silently, and deletes old steps before the new one is safe.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fm_jax.checkpoint import leaves, read, retention, seal
from fm_jax.checkpoint.read import load_meta, load_params
from fm_jax.checkpoint.together import agree, barrier
from fm_jax.core import provenance, tree
from fm_jax.core.errors import CheckpointError, ConfigError, FmError, ResourceError

__all__ = ["Store", "load_meta", "load_params"]
_log = logging.getLogger(__name__)


class Store:
    """The checkpoints in one directory. With several processes, each must create it and make the same calls."""

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str | None = None,
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Open or create `directory`.

        Args:
            directory: a path on a file system shared by all processes.
            keep_last: number of newest steps to keep, at least 1.
            keep_best: number of steps with the lowest `metric` to keep as well.
            metric: name of the metric, lower is better; a save without it is never best.
            meta: JSON data, usually {"config": ...}; "versions", "devices" and, in a git checkout, "git" are added.
            files: {path: content}, written into every step, so that its model can be opened without anything else.

        Raises:
            ConfigError: an invalid value.
            CheckpointError: the directory cannot be created or written.
            ResourceError: no space for it.
        """
        if "://" in str(directory):
            raise ConfigError(
                f"checkpoint directory {directory} is not a local path; mount the bucket and give its path"
            )
        if keep_last < 1 or keep_best < 0:
            raise ConfigError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
        self._directory = Path(directory).absolute()
        self._keep_last, self._keep_best, self._metric = keep_last, keep_best, metric
        made_of = {
            "versions": provenance.versions(),
            "devices": provenance.devices(),
            "git": provenance.git(Path(__file__)),
        }
        self._meta = {**{name: fact for name, fact in made_of.items() if fact is not None}, **meta}
        _json(self._meta)
        self._files = dict(files or {})
        self._first = jax.process_index() == 0
        agree(_refused(self._directory) if self._first else None)
        logging.getLogger("absl").addFilter(_no_traceback)
        self._orbax = ocp.StandardCheckpointer()
        self._thread: threading.Thread | None = None
        self._failure: FmError | None = None
        self._saves, self._warned = 0, False
        self._unjudged: set[int] = set()
        if self._first:
            self._warn_of_unsealed()

    def save(self, step: int, state: Any, data: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Start saving; return as soon as `state` may be changed or donated. Waits for a previous save first.

        Args:
            step: a step above every step in the directory.
            state: any tree of arrays.
            data: JSON data, the position of the data iterator.
            metrics: metrics of this step; `best_step` compares the store's `metric`.

        Raises:
            CheckpointError: `step` is not above the latest, or the previous save failed.
            ResourceError: no space for this save, or for the previous one.
        """
        self.wait()
        step, arrays = int(step), leaves.named(state)
        record = self._describe(step, arrays, data, metrics or {})
        agree(self._prepare(step, arrays) if self._first else None)
        pending = self._directory / read.UNSEALED / str(step)
        try:
            self._orbax.save(pending / "state", tree.unflatten(arrays))
        except Exception as error:
            self._discard(pending)
            raise seal.failure(f"saving checkpoint {step} in {self._directory}", error) from error
        self._saves += 1
        self._thread = threading.Thread(target=self._finish, args=(step, pending, record), name=f"seal-{step}")
        self._thread.start()

    def judged(self, step: int) -> bool:
        """Return whether a sealed step has metrics."""
        return bool(read.record(read.folder(self._directory, step))["metrics"])

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a sealed step that was saved without any: a signal had ended its evaluation.

        Raises:
            CheckpointError, ResourceError: on every process, if they cannot be written.
        """
        agree(self._add(step, metrics) if self._first else None)

    def wait(self) -> None:
        """Wait until the last save is sealed; raise its error, if any, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def last_step(self) -> int | None:
        """Return the newest sealed step, without waiting for a save in progress."""
        return max(seal.steps(self._directory), default=None)

    def best_step(self) -> int | None:
        """Return the sealed step with the lowest metric (on a tie the earliest); None if no step has it.

        Raises:
            CheckpointError: a step is damaged or cannot be read, and may be the best.
        """
        return read.best(self._directory, self._metric)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Verify and read a sealed step.

        Args:
            step: a result of `last_step` or `best_step`.
            abstract_state: the state as ShapeDtypeStructs with shardings of any mesh.

        Returns:
            The state in those shardings, and the `data` saved with it.

        Raises:
            CheckpointError: no such step; a damaged file; a leaf that is missing, superfluous, or of another shape or
                dtype. Nothing is converted, and no partial state is returned.
        """
        self.wait()
        folder = read.folder(self._directory, step)
        record = read.record(folder)
        wanted = leaves.named(abstract_state)
        if problems := leaves.differences(read.stored(record), {k: leaves.signature(v) for k, v in wanted.items()}):
            listed = leaves.listing(problems, 5)
            raise CheckpointError(f"checkpoint {step} in {self._directory} is of another model or optimiser: {listed}")
        restored = read.arrays(folder, {name: leaves.abstract(leaf) for name, leaf in wanted.items()})
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted]), record[
            "data"
        ]

    def meta(self, step: int) -> dict[str, Any]:
        """Return the `meta` saved with the step."""
        return load_meta(self._directory, step)

    def close(self) -> None:
        """Wait for the last save, then release the threads. Without it, a save in progress at exit is lost."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except FmError as failure:
            if error is None:
                raise
            _log.error("%s", failure)  # the error that ended the block propagates

    def _describe(
        self, step: int, arrays: dict[str, Any], data: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> str:
        values = _values(metrics)
        if values and self._metric is not None and self._metric not in values and not self._warned:
            self._warned = True  # another hook's metrics, or a misspelt name: warn once
            _log.warning("checkpoint %d cannot be best: metric %r is not in %s", step, self._metric, ", ".join(values))
        return _json({
            "step": step,
            "metric": self._metric,
            "metrics": values,
            "data": dict(data),
            "meta": self._meta,
            "leaves": {name: leaves.signature(leaf) for name, leaf in arrays.items()},
        })  # fmt: skip

    def _add(self, step: int, metrics: Mapping[str, float]) -> FmError | None:
        try:
            seal.add(read.folder(self._directory, step), read.LATE, _values(metrics))
        except (OSError, FmError) as error:
            return seal.failure(f"adding metrics to checkpoint {step} in {self._directory}", error)
        return None

    def _prepare(self, step: int, arrays: dict[str, Any]) -> FmError | None:
        """Prepare the directory for a step; return an error if it cannot be saved."""
        try:
            latest = self.last_step()
        except FmError as error:
            return error
        if step < 0 or (latest is not None and step <= latest):
            return CheckpointError(
                f"checkpoint {step} is not above the latest, {latest}, in {self._directory}; "
                f"to go back, first move the later steps out of the directory"
            )
        # metadata needs far less than the margin
        need = int(1.05 * leaves.size(arrays.values())) + sum(map(len, self._files.values())) + 1_000_000
        try:
            free = shutil.disk_usage(self._directory).free
            if free < need:
                return ResourceError(
                    f"no space for checkpoint {step}: need {leaves.amount(need)}, have {leaves.amount(free)} "
                    f"in {self._directory}"
                )
            taken, pending = self._directory / str(step), self._directory / read.UNSEALED / str(step)
            if taken.exists():
                aside = next(p for n in range(1, 1000) if not (p := pending.with_name(f"{step}.aside-{n}")).exists())
                taken.rename(aside)
                _log.warning("checkpoint %d has no seal; moved it to %s before saving that step", step, aside)
            if pending.exists():
                shutil.rmtree(pending)
                _log.warning("removed the unfinished checkpoint %s; saving that step again", pending)
        except OSError as error:
            return seal.failure(f"saving checkpoint {step} in {self._directory}", error)
        return None

    def _finish(self, step: int, pending: Path, record: str) -> None:
        """Wait for Orbax, seal, and delete old steps; runs in a thread on every process."""
        final = self._directory / str(step)
        try:
            self._orbax.wait_until_finished()
            if self._first:
                for name, content in self._files.items():
                    (pending / name).parent.mkdir(parents=True, exist_ok=True)
                    seal.write(pending / name, content)
                seal.write(pending / read.RECORD, record.encode())
                size = seal.publish(pending, final)
                _log.info("checkpoint %d sealed, %s in %s", step, leaves.amount(size), self._directory)
        except Exception as error:
            self._failure = seal.failure(f"saving checkpoint {step} in {self._directory}", error)
            self._failure.__cause__ = error
            self._discard(pending)
            if not threading.main_thread().is_alive():  # nothing can raise it any more
                _log.error("%s (close the store before the program ends)", self._failure)
        try:
            if self._first and self._failure is None:
                self._retain(step)
        except Exception as error:  # the step is safe; the other processes wait at the barrier
            _log.warning("could not delete old checkpoints in %s: %s", self._directory, error)
        try:
            barrier(f"fm_jax/{self._directory}/{step}/{self._saves}")
            if self._failure is None and not (final / seal.SEAL).is_file():
                self._failure = CheckpointError(f"process 0 did not seal checkpoint {step}; see its error")
        except Exception as error:
            self._failure = self._failure or seal.failure(f"sealing checkpoint {step}", error)

    def _retain(self, newest: int) -> None:
        """Delete the steps that are neither among the last nor the best; `newest` is sealed."""
        kept = {"keep_last": self._keep_last, "keep_best": self._keep_best}
        old, unjudged = retention.choose(self._directory, metric=self._metric, **kept)
        for step in unjudged.keys() - self._unjudged:
            _log.warning("keeping a checkpoint that cannot be judged: %s", unjudged[step])
        self._unjudged = set(unjudged)
        retention.delete(self._directory, old, newest=newest)

    def _discard(self, pending: Path) -> None:
        if self._first:
            shutil.rmtree(pending, ignore_errors=True)  # frees the space of a save that failed with a full disk

    def _warn_of_unsealed(self) -> None:
        cut = sorted(p.name for p in (self._directory / read.UNSEALED).iterdir() if p.name.isdecimal())
        cut += map(str, seal.unsealed(self._directory))
        if cut:
            _log.warning(
                "ignoring unfinished checkpoints %s in %s; the last sealed one is %s",
                ", ".join(cut[:8]), self._directory, self.last_step(),
            )  # fmt: skip


def _refused(directory: Path) -> FmError | None:
    """Create the directory; return an error if no step could be written or named in it, before anything is computed."""
    made = directory / read.UNSEALED / f".{os.urandom(4).hex()}.probe"
    try:
        made.mkdir(parents=True)
        made.rename(directory / made.name).rmdir()
    except OSError as error:
        with contextlib.suppress(OSError):
            made.rmdir()
        return seal.failure(f"opening checkpoint directory {directory}", OSError(error.errno, error.strerror))
    return None


def _values(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics as JSON data: numbers, and "nan", "inf" or "-inf"."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, indent=1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a checkpoint's meta and data must be JSON data: {error}") from error


def _no_traceback(entry: logging.LogRecord) -> bool:
    """Drop the hundreds of lines that Orbax logs about a failed save: `wait` raises the error with its cause."""
    return not (entry.exc_info and "orbax" in entry.pathname)
