"""The training loop of every experiment: it orders the side effects; the step is a pure function."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from fm_jax.checkpoint.store import Store
from fm_jax.core import sharding
from fm_jax.core.errors import ConfigError, NumericError, Preempted
from fm_jax.core.types import Batch, Params
from fm_jax.data.stream.device import prefetch
from fm_jax.train import state as states
from fm_jax.train.hooks import Hook
from fm_jax.train.log import Writer
from fm_jax.train.profile import Trace
from fm_jax.train.signals import Interrupted, StopSignal
from fm_jax.train.state import TrainState
from fm_jax.train.step import Step
from fm_jax.train.watchdog import Watchdog


class Stream(Protocol):
    """A stream of batches that depends on (seed, step) only, such as `data.stream.loader.Batches`."""

    def iterate(self, start: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield this process's rows of the global batches start, start + 1, …: {field: [rows, …]}."""
        ...

    def state(self, next_batch: int) -> dict[str, Any]:
        """Return the JSON data that a checkpoint stores of the stream."""
        ...

    def resume(self, state: dict[str, Any]) -> int:
        """Return the number of the next batch; DataError if the state belongs to another stream."""
        ...


@dataclass(frozen=True)
class FitConfig:
    """Intervals in steps; 0 means only at the end."""

    num_steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    max_skipped: int = 10  # consecutive non-finite gradients before the run stops
    profile_at: int = 0  # first step of a profiler trace in the work directory; 0 for none
    profile_steps: int = 3
    stall_after: float = 1800.0  # seconds without a batch, or without a step's result, that end the run; 0: never

    def __post_init__(self) -> None:
        """Refuse counts that are out of range."""
        for name in ("num_steps", "log_every", "profile_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("eval_every", "save_every", "max_skipped", "profile_at"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if not self.stall_after >= 0:
            raise ConfigError(f"stall_after must be 0 or more seconds, not {self.stall_after}")


@dataclass(frozen=True)
class Work:
    """Tokens (or images) and FLOPs of one step on the whole batch, for the logged rates."""

    units: int = 0
    unit: str = "tokens"
    flops: float = 0.0  # forward and backward; the formula depends on the model (train/profile.py)
    peak_flops: float | None = None  # of all devices together; None if unknown, then no MFU is logged


def begin(
    create: Callable[[Params, Params], TrainState],
    make_params: Callable[[], tuple[Params, Params]],
    mesh: Mesh,
    *,
    store: Store | None,
    batches: Stream,
    layout: Params | None = None,
) -> TrainState:
    """Return the state to start or resume from.

    1. The newest sealed checkpoint of the store, whatever mesh it was saved on.
    2. Else the state that `create` makes of `make_params()`: pretrained or randomly initialised (trained, frozen)
       parameters, so that the optimiser is initialised from the loaded values.

    With `layout`, the model's parameters as `state.layout` returns them, a resumed run makes no parameters:
    `make_params` is only traced for its shapes. Without `layout` it makes them for their shardings and frees them.

    Raises:
        DataError: the checkpoint was made on other data, so its position in the stream is meaningless.
    """
    if store is None or (step := store.last_step()) is None:
        return states.place(create, *make_params(), mesh)
    params = make_params() if layout is None else states.traced(make_params, layout, mesh)
    wanted = states.abstract(create, *params, mesh)
    del params  # free them before the stored ones are read
    state, data = store.restore(step, wanted)
    batches.resume(data)
    return state


def fit(
    cfg: FitConfig,
    step: Step,
    state: TrainState,
    batches: Stream,
    *,
    mesh: Mesh,
    store: Store | None = None,
    writer: Writer,
    hooks: Sequence[Hook] = (),
    work: Work | None = None,
    trace_dir: str | Path = "trace",
) -> TrainState:
    """Train from the state's step to `cfg.num_steps`; save and return the last state.

    Metrics of a step are fetched while the device runs the next one, so that the device never waits for the host.

    A signal is obeyed after the current step. It also ends an evaluation that is not the last one, and with one process
    a wait for data. A step whose evaluation was ended is saved without metrics; they are measured at the next start.

    Raises:
        NumericError: more than `cfg.max_skipped` steps in a row had a non-finite gradient; they changed no parameter.
        Preempted: SIGTERM or SIGINT was received; the state has been saved.
    """
    first = number = saved = int(state.step)
    if first >= cfg.num_steps:
        return state
    clock, trace = _Clock(work or Work()), Trace(cfg.profile_at, cfg.profile_steps, trace_dir)
    jitted = jax.jit(step, donate_argnums=0)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    reason: str | None = None
    stream = prefetch(batches.iterate(first), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh), StopSignal() as stop, Watchdog(cfg.stall_after) as watch, closing(stream), trace:
        if store is not None and store.last_step() == first and not store.judged(first):
            if owed := _evaluate(hooks, first, state, clock, stop, last=False):
                writer.write(first, owed)
                store.judge(first, owed)
            reason = stop.agreed(first)
        while number < cfg.num_steps and not reason:
            batch, measured = _wait(stream, stop, watch), {}
            if batch is not None:
                trace.before(number, wait_for=state)
                with watch.over("result of a step") if number > first else nullcontext():  # the first call compiles
                    state, metrics = jitted(state, batch)
                    number += 1
                    _settle(pending, cfg, clock, writer)
                pending = (number, metrics)
                measured = _evaluate(hooks, number, state, clock, stop, last=number == cfg.num_steps)
            if measured:
                writer.write(number, measured)
            reason = stop.agreed(number)
            due = number == cfg.num_steps or reason or (cfg.save_every and number % cfg.save_every == 0)
            if store is not None and due and number > saved:
                with watch.over("result of a step"):
                    _settle(pending, cfg, clock, writer)
                pending, saved = None, number
                store.save(number, state, batches.state(number), measured or None)
    _settle(pending, cfg, clock, writer)
    if store is not None:
        store.wait()
    if number < cfg.num_steps:
        at = f"at step {number} of {cfg.num_steps}"
        kept = "saved" if number else "nothing to save"
        said = f"{kept} {at}; run the same command again to continue" if store is not None else f"stopped {at}, unsaved"
        raise Preempted(f"{reason}: {said}")
    return state


def _wait(stream: Iterator[Batch], stop: StopSignal, watch: Watchdog) -> Batch | None:
    """Return the next batch; None if a signal came first."""
    try:
        with watch.over("batch"), stop.interrupting():
            return next(stream)
    except Interrupted:
        return None


def _evaluate(
    hooks: Sequence[Hook], number: int, state: TrainState, clock: "_Clock", stop: StopSignal, *, last: bool
) -> dict[str, float]:
    """Return the metrics of the hooks that are due; {} if a signal ended them, but not after the last step."""
    measured: dict[str, float] = {}
    for hook in hooks:
        if not hook.due(number, last):
            continue
        clock.pause()
        try:
            with nullcontext() if last else stop.interrupting():
                measured |= hook.call(number, state) or {}
        except Interrupted:
            return {}
        finally:
            clock.resume()
    return measured


def _settle(pending: tuple[int, dict[str, jax.Array]] | None, cfg: FitConfig, clock: "_Clock", writer: Writer) -> None:
    """Fetch a finished step's metrics; write them when due; stop the run after too many non-finite gradients."""
    if pending is None:
        return
    number, values = pending
    metrics = {name: float(value) for name, value in jax.device_get(values).items()}
    skip, skipped = metrics.pop("skip"), int(metrics.pop("skipped"))
    clock.tick()
    if skip:
        writer.write(number, {"train/skipped": skipped})
    if skipped > cfg.max_skipped:
        raise NumericError(
            f"step {number}: gradient not finite {skipped} times in a row (limit {cfg.max_skipped}); these steps "
            "changed no parameter: lower the learning rate, or check the data of these steps"
        )
    if number % cfg.log_every == 0 or number == cfg.num_steps:
        writer.write(number, {f"train/{name}": value for name, value in metrics.items()} | clock.rates())


class _Clock:
    """Rates since the last call of `rates`, excluding pauses and the first step, which compiles."""

    def __init__(self, work: Work) -> None:
        self.work, self.steps, self.since, self.paused = work, -1, time.perf_counter(), 0.0

    def tick(self) -> None:
        """Count a finished step."""
        self.steps += 1
        if self.steps == 0:
            self.since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, for an evaluation."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        """Start the clock again."""
        self.since += time.perf_counter() - self.paused

    def rates(self) -> dict[str, float]:
        """Return steps, units and model FLOPs a second since the last call."""
        now = time.perf_counter()
        if self.steps < 1 or now <= self.since:
            return {}
        rate = self.steps / (now - self.since)
        self.steps, self.since = 0, now
        rates = {"rate/steps_per_second": rate}
        if self.work.units:
            rates[f"rate/{self.work.unit}_per_second"] = rate * self.work.units
        if self.work.flops and self.work.peak_flops:
            rates["rate/mfu"] = rate * self.work.flops / self.work.peak_flops
        return rates
