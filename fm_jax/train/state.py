"""What changes during training, made directly in its shards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from fm_jax.core import sharding
from fm_jax.core.types import Params


class TrainState(struct.PyTreeNode):
    """Everything a step reads and writes; the random key is not here, for it is a function of `step`."""

    step: jax.Array  # int32: batches seen, skipped ones included
    params: Params  # the leaves being trained
    frozen: Params  # leaves the optimiser never sees; {} when everything is trained
    opt_state: Any
    ema: Params | None  # running mean of `params`, or None
    skipped: jax.Array  # int32: steps skipped one after another because of a non-finite gradient


def create(params: Params, tx: optax.GradientTransformation, *, frozen: Params | None = None, ema: bool) -> TrainState:
    """Return the state before the first step. Pretrained parameters go in here, before `tx.init` sees them."""
    # no two leaves may share a buffer: the step's donation would give it away twice
    counters = [jnp.zeros((), jnp.int32) for _ in range(2)]
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(counters[0], params, frozen or {}, tx.init(params), mean, counters[1])


def init_params(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh) -> Params:
    """Run a model's boxed `init(key)` under jit so that each device makes its own shard only."""
    place = sharding.shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(_unboxed, static_argnums=0, out_shardings=place)(init, key)


def abstract(
    create_state: Callable[[Params, Params], TrainState], params: Params, frozen: Params, mesh: Mesh
) -> TrainState:
    """Return the state's shapes with shardings: what a checkpoint is restored onto, and how a new one is placed.

    Leaves of the optimiser's state and of the mean that stand at a parameter's path with its shape are laid out as
    that parameter; everything else is replicated.
    """
    shapes = jax.eval_shape(create_state, params, frozen)
    # a stack that is frozen in part has its lower layers at the same path in the one tree as its upper in the other
    leaves = [*jax.tree_util.tree_leaves_with_path(params), *jax.tree_util.tree_leaves_with_path(frozen)]
    layouts = {(_key(path), leaf.shape): leaf.sharding for path, leaf in leaves}

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where: Any = sharding.replicated(mesh)
        for start in range(len(path)):
            layout = layouts.get((_key(path[start:]), leaf.shape))
            if isinstance(layout, NamedSharding):
                where = layout
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, shapes)


def place(
    create_state: Callable[[Params, Params], TrainState], params: Params, frozen: Params, mesh: Mesh
) -> TrainState:
    """Create the state with every leaf already in its shard."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract(create_state, params, frozen, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(create_state, out_shardings=layout)(params, frozen)


def _unboxed(init: Callable[[jax.Array], Any], key: jax.Array) -> Params:
    return meta.unbox(init(key))


def _key(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
