"""One stage of training in its work directory: the numbers that each one has, its batches, and its run.

An experiment brings data, model and loss; everything that would be said again in each of them is said here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fm_jax.checkpoint.store import Store
from fm_jax.core import mesh as meshes
from fm_jax.core import sharding
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, LossFn, Params
from fm_jax.data import loader
from fm_jax.data.device import prefetch
from fm_jax.data.mixture import Source
from fm_jax.optim import optimizer as optimizers
from fm_jax.optim import schedule
from fm_jax.train import log, loop, state
from fm_jax.train.hooks import Hook
from fm_jax.train.step import make_train_step

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


def once(cfg: Plan, source: Source, mesh: Mesh) -> Iterator[Batch]:
    """Yield a split once, in order, on the devices; rows that fill the last batch up have weight 0."""
    epoch = loader.Epoch(source, cfg.batch_size // cfg.accumulate, **_place())
    return prefetch(iter(epoch), sharding.batch_sharding(mesh))


def _place() -> dict[str, int]:
    return {"host": jax.process_index(), "hosts": jax.process_count()}


def rates(cfg: Plan, kind: schedule.Kind = "cosine", **more: Any) -> schedule.Config:
    """Return the schedule of a stage in steps; `more` are fields of `schedule.Config`."""
    steps = cfg.fit.num_steps
    return schedule.Config(
        kind=kind, peak=cfg.learning_rate, num_steps=steps, warmup_steps=int(cfg.warmup * steps), **more
    )


def train(
    cfg: Plan,
    workdir: Path,
    *,
    loss: LossFn,
    make_params: Callable[[], tuple[Params, Params]],
    batches: loop.Batches,
    mesh: Mesh,
    rates: schedule.Config,
    meta: Mapping[str, Any],
    validate: Callable[[int, state.TrainState], Mapping[str, float]] | None = None,
    metric: str | None = None,
    ema_decay: float | None = None,
    work: loop.Work | None = None,
) -> state.TrainState:
    """Train from the newest checkpoint of the work directory, or from `make_params`; return the last state, saved.

    Args:
        cfg: of the stage.
        workdir: gets checkpoints, metrics.jsonl, TensorBoard's events and profiler traces.
        loss: of a batch.
        make_params: returns (trained, frozen) parameters before the first step.
        batches: of training.
        mesh: what `open_mesh` gave.
        rates: what the learning rate does.
        meta: saved with every checkpoint: "config", as JSON data, and what later stages need besides.
        validate: (step, state) -> metrics, every `cfg.fit.eval_every` steps and after the last one.
        metric: of those, which decides the best checkpoint (the lowest).
        ema_decay: of a running mean of the trained parameters.
        work: what a step does.
    """
    tx = optimizers.make(cfg.optimizer, schedule.make(rates), jax.eval_shape(make_params)[0])

    def create(params: Params, frozen: Params) -> state.TrainState:
        return state.create(params, tx, frozen=frozen, ema=ema_decay is not None)

    with Store(workdir / "checkpoints", metric=metric, meta=meta) as store:
        begun = loop.start(create, make_params, mesh, store=store, batches=batches)
        writer = log.writers(workdir, step=int(begun.step), num_steps=cfg.fit.num_steps, tensorboard=True)
        done = loop.fit(
            cfg.fit,
            make_train_step(loss, tx, key=jax.random.key(cfg.seed), accumulate=cfg.accumulate, ema_decay=ema_decay),
            begun,
            batches,
            mesh=mesh,
            store=store,
            writer=writer,
            hooks=[Hook(validate, cfg.fit.eval_every)] if validate else [],
            work=work,
            trace_dir=workdir / "trace",
        )
        writer.close()
    return done
