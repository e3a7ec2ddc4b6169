"""One stage of training in its work directory: its settings, its batches and its run.

An experiment provides data, model and loss; the wiring that all experiments share is here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import flax.linen as nn
import jax
from jax.sharding import Mesh

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint import read
from fm_jax.checkpoint.store import Store
from fm_jax.core import mesh as meshes
from fm_jax.core import sharding, tree
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.types import Batch, LossFn, Params
from fm_jax.data.stream import loader
from fm_jax.data.stream.device import prefetch
from fm_jax.data.stream.source import Source
from fm_jax.optim import optimizer as optimizers
from fm_jax.optim import schedule
from fm_jax.train import log, loop, state
from fm_jax.train.hooks import Hook
from fm_jax.train.plan import step as planned
from fm_jax.train.plan import target as targets
from fm_jax.train.signals import interruptible
from fm_jax.train.step import Combine, Step, make_train_step

RESUMABLE = ("fit.log_every", "fit.save_every", "fit.profile_*", "fit.stall_after", "mesh.*", "workers")
"""Options of a plan that may change when a run is resumed: they change no result."""

_FEW = 2  # rows that `--plan` reads; mixing images needs pairs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a stage, except those of its model and data; the schedule spans `fit.num_steps`."""

    fit: loop.FitConfig
    learning_rate: float
    batch_size: int  # rows per step, over all devices
    accumulate: int = 1  # microbatches per step
    warmup: float = 0.0  # share of the steps
    optimizer: optimizers.Config = optimizers.Config()
    data_dir: Path | None = None  # folder of data sets and derived files; None: in the work directory
    workers: int = 0  # processes that read ahead
    mesh: meshes.MeshConfig = meshes.MeshConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together."""
        check_least(self, batch_size=1, accumulate=1, workers=0, seed=0)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if not self.learning_rate >= 0:
            raise ConfigError(f"learning_rate must be at least 0, not {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share of the steps, at least 0 and below 1, not {self.warmup}")


Planned = TypeVar("Planned", bound=Plan)


def open_mesh(cfg: Plan) -> Mesh:
    """Return the mesh of a stage; under `--plan`, of the planned chips, on which nothing can be run.

    Raises:
        ConfigError: the mesh does not match the number of devices, or the batch is not divisible by its shards.
    """
    target = targets.current()
    mesh = meshes.make_mesh(cfg.mesh, None if target is None else target.devices)
    if cfg.batch_size // cfg.accumulate % (ways := sharding.batch_ways(mesh)):
        raise ConfigError(
            f"batch_size {cfg.batch_size} / accumulate {cfg.accumulate} does not divide over {ways} shards "
            "(mesh.data × mesh.fsdp)"
        )
    return mesh


def batches(cfg: Plan, source: Source, *, repeats: int = 1) -> loader.Batches:
    """Return this process's share of a training split's batches, reshuffled in each epoch.

    Under `--plan` a batch has a few rows only, whose shapes are all that is needed.
    """
    options = {"seed": cfg.seed, "workers": cfg.workers, "repeats": repeats}
    if targets.current() is not None:
        few = max(_FEW, repeats + repeats % 2)
        return loader.Batches(source, few, cfg.seed, repeats=repeats, threads=0)
    return loader.Batches(source, cfg.batch_size, **options, **_place())


def one_pass(cfg: Plan, source: Source, mesh: Mesh, *, rows: int | None = None) -> Iterator[Batch]:
    """Yield one pass over a split, in order, on the devices; rows that pad the last batch have weight 0.

    Args:
        cfg: the stage's plan.
        source: rows of the split.
        mesh: mesh from `open_mesh`.
        rows: rows per batch, rounded down to a multiple of the mesh's shards; by default those of a microbatch.
    """
    size = cfg.batch_size // cfg.accumulate
    if rows is not None:
        ways = sharding.batch_ways(mesh)
        size = max(rows // ways, 1) * ways
    return interruptible(prefetch(iter(loader.Epoch(source, size, **_place())), sharding.batch_sharding(mesh)))


def at_most(cfg: Planned, rows: int, mesh: Mesh) -> Planned:
    """Return the plan for a small split: a batch of at most `rows`, rounded down to a multiple of shards × accumulate.

    Raises:
        DataError: there are fewer rows than shards × accumulate.
    """
    parts = sharding.batch_ways(mesh) * cfg.accumulate
    if rows < parts:
        raise DataError(
            f"{rows} rows are fewer than one for each of {parts} shards and parts of a batch; use fewer devices, or a "
            "smaller accumulate"
        )
    return cfg if cfg.batch_size <= rows else replace(cfg, batch_size=rows // parts * parts)


def _place() -> dict[str, int]:
    return {"host": jax.process_index(), "hosts": jax.process_count()}


def rates(cfg: Plan, kind: schedule.Kind = "cosine", **more: Any) -> schedule.Config:
    """Return the learning-rate schedule of a stage in steps; `more` are fields of `schedule.Config`."""
    steps = cfg.fit.num_steps
    return schedule.Config(
        kind=kind, peak=cfg.learning_rate, num_steps=steps, warmup_steps=int(cfg.warmup * steps), **more
    )


def epochs(count: int, rows: int, batch_size: int) -> loop.FitConfig:
    """Return the config of `count` epochs over `rows`: evaluate every 1/20 of the steps, save every 1/100.

    The steps are rounded down once, over all epochs together, because batches cross the boundaries of epochs.
    """
    steps = count * rows // batch_size
    return loop.FitConfig(steps, log_every=50, eval_every=steps // 20, save_every=steps // 100)


class Trainer(NamedTuple):
    """What is compiled once: fits that differ only in their data and initial weights may share it."""

    create: Callable[[Params, Params], state.TrainState]  # (trained, frozen) -> the state before the first step
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
        cfg: the stage's plan.
        loss: loss function of a batch.
        rates: learning-rate schedule.
        make_params: returns (trained, frozen) parameters; only traced here, for their shapes.
        combine: (trained, frozen) -> the model's parameters.
        ema_decay: decay of an exponential moving average of the trained parameters; None for no average.
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
    batches: loop.Stream,
    mesh: Mesh,
    model: nn.Module,
    meta: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    layout: Params | None = None,
    validate: Callable[[int, state.TrainState], Mapping[str, float]] | None = None,
    metric: str | None = None,
    split: str = "validation",
    work: loop.Work | None = None,
    store: bool = True,
    writer: log.Writer | None = None,
) -> state.TrainState:
    """Train from the newest checkpoint of the work directory, or from `make_params`; save and return the last state.

    Under `--plan` the step is compiled instead, and `plan.step.Compiled` ends the experiment.

    Args:
        cfg: the stage's plan.
        workdir: folder for checkpoints, metrics.jsonl, TensorBoard events and profiler traces.
        trainer: optimiser and step from `make_trainer`.
        make_params: returns (trained, frozen) parameters before the first step.
        batches: training batches.
        mesh: mesh from `open_mesh`.
        model: the trained model; every checkpoint describes it, so that a later stage can open it.
        meta: saved with every checkpoint: "config", as JSON data, and what later stages also need.
        files: {path: content}, saved with every checkpoint, such as the tokenizer's, for later stages.
        layout: the whole model's `state.layout`; with it, a resumed run makes no initial parameters.
        validate: (step, state) -> metrics, called every `cfg.fit.eval_every` steps and after the last step.
        metric: name of the validation metric whose lowest value decides the best checkpoint.
        split: split that `validate` measures; "SPLIT/" is the prefix of its metrics in the log and in checkpoints.
        work: tokens or images, and FLOPs, per step.
        store: save checkpoints and resume from them; False for a fit of seconds, which always starts from scratch.
        writer: metric writer; by default metrics.jsonl, TensorBoard and the console.
    """
    if (target := targets.current()) is not None:
        _compile(target, cfg, trainer, make_params, batches, mesh, layout, work)
    hooks = [] if validate is None else [Hook(_named(split, validate), cfg.fit.eval_every)]
    best = f"{split}/{metric}" if metric else None
    with ExitStack() as stack:
        kept = stack.enter_context(_store(workdir, best, model, meta, files)) if store else None
        initial = loop.begin(trainer.create, make_params, mesh, store=kept, batches=batches, layout=layout)
        if writer is None:
            writer = log.writers(workdir, step=int(initial.step), num_steps=cfg.fit.num_steps, tensorboard=True)
            stack.callback(writer.close)
        told: dict[str, Any] = {"writer": writer, "hooks": hooks, "work": work, "trace_dir": workdir / "trace"}
        return loop.fit(cfg.fit, trainer.step, initial, batches, mesh=mesh, store=kept, **told)


def _compile(
    target: targets.Target,
    cfg: Plan,
    trainer: Trainer,
    make_params: Callable[[], tuple[Params, Params]],
    batches: loop.Stream,
    mesh: Mesh,
    layout: Params | None,
    work: loop.Work | None,
) -> NoReturn:
    """Compile the step for the planned chips, and end the experiment with the report."""
    report = planned.compile_step(
        target,
        trainer.step,
        trainer.create,
        make_params,
        batches,
        mesh,
        layout=layout,
        batch_size=cfg.batch_size,
        accumulate=cfg.accumulate,
        last=cfg.fit.num_steps - 1,
        model_flops=work.flops if work else 0.0,
    )
    raise planned.Compiled(report)


def _store(
    workdir: Path, metric: str | None, model: nn.Module, meta: Mapping[str, Any], files: Mapping[str, bytes] | None
) -> Store:
    """Open the checkpoints of a run; CheckpointError if it has begun, but they are gone."""
    read.to_resume(workdir)
    return Store(workdir / "checkpoints", metric=metric, meta={**meta, "model": models.describe(model)}, files=files)


Validate = Callable[[int, state.TrainState], Mapping[str, float]]


def _named(split: str, validate: Validate) -> Validate:
    """Return `validate` with the prefix "SPLIT/" before its metrics' names."""
    return lambda step, now: {f"{split}/{name}": value for name, value in validate(step, now).items()}
