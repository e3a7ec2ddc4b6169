"""The same pure step under `jax.pmap`: one copy of the state a device, gradients summed by name.

`jax.jit` over a mesh is how everything else here runs (pmap is in maintenance, and is jit + shard_map inside).
This file is the older form in full; a test holds the two to the same numbers.
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
    """Make a pmapped step over all local devices: state replicated, batch split by its first axis.

    For a plain loop of one's own, not for `fit`: pmap refuses to run where a mesh is set.
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
    """Deal a batch out to the local devices: [B, ...] -> [devices, B/devices, ...]."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for name, x in batch.items()}
