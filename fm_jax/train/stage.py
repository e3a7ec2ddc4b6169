"""One stage of training in its work directory: the numbers that each one has, its batches, and its run.

An experiment brings data, model and loss; everything that would be said again in each of them is said here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
from jax.sharding import Mesh

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint.store import Store
from fm_jax.core import mesh as meshes
from fm_jax.core import sharding, tree
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.types import Batch, LossFn, Params
from fm_jax.data.stream import loader
from fm_jax.data.stream.device import prefetch
from fm_jax.data.stream.source import Source
from fm_jax.optim import optimizer as optimizers
from fm_jax.optim import schedule
from fm_jax.train import log, loop, state
from fm_jax.train.hooks import Hook
from fm_jax.train.step import Combine, Step, make_train_step

RESUMABLE = ("fit.log_every", "fit.save_every", "fit.profile_*", "mesh.*", "workers")
"""Options of a plan that may change from one start of a run to the next: they change no number."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a stage that are not its model's or its data's; the schedule spans `fit.num_steps`."""

    fit: loop.FitConfig
    learning_rate: float
    batch_size: int  # rows a step, over all devices
    accumulate: int = 1  # parts a step's batch is worked through in
    warmup: float = 0.0  # share of the steps
    optimizer: optimizers.Config = optimizers.Config()
    data_dir: Path | None = None  # where data sets and what is made of them are kept; None: in the work directory
    workers: int = 0  # processes that read ahead
    mesh: meshes.MeshConfig = meshes.MeshConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if not self.learning_rate >= 0:
            raise ConfigError(f"learning_rate must be at least 0, not {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share of the steps, at least 0 and below 1, not {self.warmup}")


Planned = TypeVar("Planned", bound=Plan)


def open_mesh(cfg: Plan) -> Mesh:
    """Return the mesh of a stage.

    Raises:
        ConfigError: a mesh that the devices do not make up, or whose shards do not divide the batch.
    """
    mesh = meshes.make_mesh(cfg.mesh)
    if cfg.batch_size // cfg.accumulate % (ways := sharding.batch_ways(mesh)):
        raise ConfigError(
            f"batch_size {cfg.batch_size} / accumulate {cfg.accumulate} does not divide over {ways} shards "
            "(mesh.data × mesh.fsdp)"
        )
    return mesh


def batches(cfg: Plan, source: Source, *, repeats: int = 1) -> loader.Batches:
    """Return this process's share of a training split's batches, shuffled anew at each pass."""
    options = {"seed": cfg.seed, "workers": cfg.workers, "repeats": repeats}
    return loader.Batches(source, cfg.batch_size, **options, **_place())


def once(cfg: Plan, source: Source, mesh: Mesh, *, rows: int | None = None) -> Iterator[Batch]:
    """Yield a split once, in order, on the devices; rows that fill the last batch up have weight 0.

    Args:
        cfg: of the stage.
        source: of the split.
        mesh: what `open_mesh` gave.
        rows: at a time, rounded down to whole shares of the mesh; as many as a step works through at once by default.
    """
    size = cfg.batch_size // cfg.accumulate
    if rows is not None:
        ways = sharding.batch_ways(mesh)
        size = max(rows // ways, 1) * ways
    return prefetch(iter(loader.Epoch(source, size, **_place())), sharding.batch_sharding(mesh))


def at_most(cfg: Planned, rows: int, mesh: Mesh) -> Planned:
    """Return the plan for a split of few rows: a batch no larger than they are, in whole shares of the mesh.

    Raises:
        DataError: fewer rows than there are shards and parts.
    """
    parts = sharding.batch_ways(mesh) * cfg.accumulate
    if rows < parts:
        raise DataError(
            f"{rows} rows are fewer than one for each of {parts} shards and parts of a batch; use fewer devices"
        )
    return cfg if cfg.batch_size <= rows else replace(cfg, batch_size=rows // parts * parts)


def _place() -> dict[str, int]:
    return {"host": jax.process_index(), "hosts": jax.process_count()}


def rates(cfg: Plan, kind: schedule.Kind = "cosine", **more: Any) -> schedule.Config:
    """Return the schedule of a stage in steps; `more` are fields of `schedule.Config`."""
    steps = cfg.fit.num_steps
    return schedule.Config(
        kind=kind, peak=cfg.learning_rate, num_steps=steps, warmup_steps=int(cfg.warmup * steps), **more
    )


def epochs(count: int, rows: int, batch_size: int) -> loop.FitConfig:
    """Return the plan of so many passes over so many rows: evaluated every twentieth of the way, saved every hundredth.

    The steps are rounded down once, over all passes together, as batches run on from one pass into the next.
    """
    steps = count * rows // batch_size
    return loop.FitConfig(steps, log_every=50, eval_every=steps // 20, save_every=steps // 100)


class Trainer(NamedTuple):
    """What is compiled once: several fits that differ in their data and first weights alone may share it."""

    create: Callable[[Params, Params], state.TrainState]  # the state before the first step, of (trained, frozen)
    step: Step


def make_trainer(
    cfg: Plan,
    loss: LossFn,
    rates: schedule.Config,
    make_params: Callable[[], tuple[Params, Params]],
    *,
    combine: Combine = tree.merge,
    ema_decay: float | None = None,
) -> Trainer:
    """Make the optimiser and the step of a stage.

    Args:
        cfg: of the stage.
        loss: of a batch.
        rates: what the learning rate does.
        make_params: returns (trained, frozen) parameters; traced here, for their shapes.
        combine: how the two make the model's parameters.
        ema_decay: of a running mean of the trained parameters.
    """
    tx = optimizers.make(cfg.optimizer, schedule.make(rates), jax.eval_shape(make_params)[0])
    key = jax.random.key(cfg.seed)
    step = make_train_step(loss, tx, key=key, accumulate=cfg.accumulate, ema_decay=ema_decay, combine=combine)
    return Trainer(lambda params, frozen: state.create(params, tx, frozen=frozen, ema=ema_decay is not None), step)


def train(
    cfg: Plan,
    workdir: Path,
    trainer: Trainer,
    *,
    make_params: Callable[[], tuple[Params, Params]],
    batches: loop.Batches,
    mesh: Mesh,
    model: nn.Module,
    meta: Mapping[str, Any],
    layout: Params | None = None,
    validate: Callable[[int, state.TrainState], Mapping[str, float]] | None = None,
    metric: str | None = None,
    split: str = "validation",
    work: loop.Work | None = None,
    store: bool = True,
    writer: log.Writer | None = None,
) -> state.TrainState:
    """Train from the newest checkpoint of the work directory, or from `make_params`; return the last state, saved.

    Args:
        cfg: of the stage.
        workdir: gets checkpoints, metrics.jsonl, TensorBoard's events and profiler traces.
        trainer: what `make_trainer` made.
        make_params: returns (trained, frozen) parameters before the first step.
        batches: of training.
        mesh: what `open_mesh` gave.
        model: what is trained; every checkpoint describes it, so that a later stage opens it again.
        meta: saved with every checkpoint: "config", as JSON data, and what later stages need besides.
        layout: what `state.layout` gives of the whole model; then a run that goes on makes no parameters first.
        validate: (step, state) -> metrics, every `cfg.fit.eval_every` steps and after the last one.
        metric: of those, which decides the best checkpoint (the lowest).
        split: what `validate` measures on; "SPLIT/" stands before its metrics' names in the log and in checkpoints.
        work: what a step does.
        store: keep checkpoints and go on from them; False for a fit of seconds, which starts anew each time.
        writer: of the metrics; metrics.jsonl, TensorBoard and the console by default.
    """
    hooks = [] if validate is None else [Hook(_named(split, validate), cfg.fit.eval_every)]
    with ExitStack() as stack:
        kept = None
        if store:
            best = f"{split}/{metric}" if metric else None
            described = {**meta, "model": models.describe(model)}
            kept = stack.enter_context(Store(workdir / "checkpoints", metric=best, meta=described))
        begun = loop.start(trainer.create, make_params, mesh, store=kept, batches=batches, layout=layout)
        if writer is None:
            writer = log.writers(workdir, step=int(begun.step), num_steps=cfg.fit.num_steps, tensorboard=True)
            stack.callback(writer.close)
        return loop.fit(
            cfg.fit,
            trainer.step,
            begun,
            batches,
            mesh=mesh,
            store=kept,
            writer=writer,
            hooks=hooks,
            work=work,
            trace_dir=workdir / "trace",
        )


Validate = Callable[[int, state.TrainState], Mapping[str, float]]


def _named(split: str, validate: Validate) -> Validate:
    """Return the same measurement with "SPLIT/" before its metrics' names."""
    return lambda step, now: {f"{split}/{name}": value for name, value in validate(step, now).items()}
