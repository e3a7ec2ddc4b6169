"""The same pure step under `jax.pmap`: a copy of the state on each device, gradients summed with `psum`.

All other training here runs with `jax.jit` over a mesh (pmap is in maintenance mode, and is jit + shard_map inside).
This file is the complete older form; a test checks that both give the same numbers.
"""

from functools import partial
from typing import Any

import jax
import optax

from fm_jax.core.types import Batch, Loss, LossFn, Params
from fm_jax.train.state import TrainState
from fm_jax.train.step import Step, make_train_step

AXIS = "replica"


def make_replicated_step(loss_fn: LossFn, tx: optax.GradientTransformation, **options: Any) -> Step:
    """Make a pmapped step over all local devices: state replicated, batch split along its first axis.

    Use it in your own loop, not in `fit`: pmap does not run while a mesh is set.
    """

    def own_noise(params: Params, batch: Batch, rng: jax.Array | None, step: jax.Array | None) -> Loss:
        own = None if rng is None else jax.random.fold_in(rng, jax.lax.axis_index(AXIS))
        return loss_fn(params, batch, own, step)

    total = partial(jax.lax.psum, axis_name=AXIS)
    step = jax.pmap(make_train_step(own_noise, tx, total=total, **options), axis_name=AXIS, donate_argnums=0)

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        new, metrics = step(state, split(batch))
        return new, jax.tree.map(lambda x: x[0], metrics)

    return run


def replicate(state: TrainState) -> TrainState:
    """Put a copy of every leaf on each local device: [...] -> [devices, ...]."""
    devices = jax.local_device_count()
    return jax.pmap(lambda _, state: state, in_axes=(0, None))(jax.numpy.zeros(devices), state)


def split(batch: Batch) -> dict[str, jax.Array]:
    """Split a batch over the local devices: [B, ...] -> [devices, B/devices, ...]."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for name, x in batch.items()}
