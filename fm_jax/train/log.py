"""Metric writers: JSON lines (the record), TensorBoard and the console. Only process 0 writes."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import jax

from fm_jax.core import json_file
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.workdir import refusal, write_atomically

_log = logging.getLogger(__name__)


class Writer(Protocol):
    """Writes the metrics of a step; may be called several times for one step (training, then evaluation)."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of the state after `step` steps."""
        ...

    def close(self) -> None:
        """Flush and close all files."""
        ...


def writers(workdir: Path, *, step: int, num_steps: int, console: bool = True, tensorboard: bool = False) -> "Tee":
    """Return the writers of a run that continues at `step`: metrics.jsonl, the console and, optionally, TensorBoard."""
    chosen: list[Writer] = [JsonLines(workdir / "metrics.jsonl", resume_step=step)]
    if console:
        chosen.append(Console(num_steps))
    if tensorboard:
        chosen.append(TensorBoard(workdir / "tensorboard", resume_step=step))
    return Tee(chosen)


class Tee:
    """Writes to several writers."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of the state after `step` steps, everywhere."""
        for writer in self.writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Close them all."""
        for writer in self.writers:
            writer.close()


class JsonLines:
    """One JSON object a line: {"step", "time" (Unix seconds), metric: value, …}; floats are exact.

    With `resume_step`, lines of later steps, left by a run that was killed after its last checkpoint, are moved to the
    end of FILE.removed, so that the file reads as one run. Each line is kept once, in one of the two files.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path, self.resume_step = Path(path), resume_step
        self._file: IO[str] | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line and flush it to the operating system."""
        if jax.process_index() != 0:
            return
        if taken := {"step", "time"} & metrics.keys():
            raise ValueError(f"a metric may not be called {' or '.join(sorted(taken))}; rename it")
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line |= {name: _exact(value) for name, value in metrics.items()}
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _keep_until(self.path, self.resume_step)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise refusal(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(self.path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines that `JsonLines` wrote, nan and infinities as floats; a line torn by a crash is left out."""
    lines = (_parse(line) for line in Path(path).read_bytes().split(b"\n"))
    return [
        {name: float(value) if isinstance(value, str) else value for name, value in line.items()}
        for line in lines
        if line is not None
    ]


def curves(path: Path, names: Mapping[str, str]) -> dict[str, tuple[list[int], list[float]]]:
    """Return {title: (steps, values)} for the metrics {title: name} of a record; metrics it lacks are left out."""
    lines = read(path)
    series = {title: [(line["step"], line[name]) for line in lines if name in line] for title, name in names.items()}
    return {title: ([p[0] for p in points], [p[1] for p in points]) for title, points in series.items() if points}


class TensorBoard:
    """TensorBoard event files, written by tensorboardX; steps of an earlier run after `resume_step` are hidden."""

    def __init__(self, directory: Path, *, resume_step: int | None = None) -> None:
        self.directory, self.resume_step = Path(directory), resume_step
        self._events: Any = None
        try:
            import tensorboardX  # noqa: F401  (a missing package must raise before the first step)
        except ImportError:
            raise ConfigError("TensorBoard logging needs the package tensorboardX; install it or turn it off") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar for each metric."""
        if jax.process_index() != 0:
            return
        try:
            if self._events is None:
                from tensorboardX import SummaryWriter

                purge = None if self.resume_step is None else self.resume_step + 1
                self._events = SummaryWriter(str(self.directory), purge_step=purge)
            for name, value in metrics.items():
                self._events.add_scalar(name, float(value), step)
        except OSError as error:
            raise refusal(self.directory, error) from error

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is None:
            return
        events, self._events = self._events, None
        try:
            events.close()
        except OSError as error:
            raise refusal(self.directory, error) from error


class Console:
    """A progress bar on a terminal; elsewhere (a log file) a line every `every_seconds`.

    Metrics without a training loss, such as an evaluation's, get a line of their own.
    """

    def __init__(self, num_steps: int, *, every_seconds: float = 10.0, file: IO[str] | None = None) -> None:
        self.num_steps, self.every_seconds, self.file = num_steps, every_seconds, file or sys.stderr
        self._first: tuple[int, float] | None = None
        self._printed = -math.inf
        self._bar: Any = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics and the time left, estimated from the rate since the first call."""
        if jax.process_index() != 0:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        words = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
        progress = any(name in ("loss", "train/loss") for name in metrics)
        text = f"{words}  {self._left(step, now)}".rstrip() if progress else words
        if self.file.isatty():
            self._draw(step, text, progress)
        elif not progress or step >= self.num_steps or now - self._printed >= self.every_seconds:
            print(f"step {step}/{self.num_steps}  {text}", file=self.file, flush=True)
            self._printed = now if progress else self._printed

    def close(self) -> None:
        """Stop the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, step: int, now: float) -> str:
        begun, since = self._first or (step, now)
        if step <= begun:
            return ""
        seconds = round((now - since) / (step - begun) * max(0, self.num_steps - step))
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _draw(self, step: int, text: str, progress: bool) -> None:
        if self._bar is None:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Terminal(file=self.file), auto_refresh=False)
            self._bar.add_task("", total=self.num_steps)
            self._bar.start()
        if progress:
            self._bar.update(0, completed=step, description=text, refresh=True)
        else:
            self._bar.console.print(f"step {step}  {text}", highlight=False, markup=False)


def _exact(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON has no nan


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json_file.parse(line, "a line of metrics", DataError)
    except DataError:
        return None
    good = isinstance(record, dict) and type(record.get("step")) is int and all(map(_is_figure, record.values()))
    return record if good else None


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value in ("nan", "inf", "-inf"))


def _keep_until(path: Path, step: int | None) -> None:
    """Move torn lines and lines of later steps to FILE.removed; a kill at any moment loses none of them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    kept, removed = list[bytes](), list[bytes]()
    for line in filter(None, content.split(b"\n")):
        stays = (record := _parse(line)) is not None and (step is None or record["step"] <= step)
        (kept if stays else removed).append(line + b"\n")
    if removed:
        aside = path.with_name(f"{path.name}.removed")
        _append_once(aside, b"".join(removed))
        after = "" if step is None else f" after step {step}"
        _log.warning("%s: moved %d lines%s to %s", path, len(removed), after, aside.name)
    if (new := b"".join(kept)) != content:
        write_atomically(path, new)


def _append_once(path: Path, text: bytes) -> None:
    """Append to a file and sync it, unless it ends with the text: an earlier start was killed just after that."""
    with open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(text) - 1))
        end = file.read()
        if end.endswith(text):
            return
        file.write((b"\n" if end and not end.endswith(b"\n") else b"") + text)  # the append itself was cut off
        file.flush()
        os.fsync(file.fileno())
