"""The training state, created directly in its shards."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from fm_jax.core import sharding, tree
from fm_jax.core.types import Params


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes; the random key is not stored because it is a function of `step`."""

    step: jax.Array  # [] int32: batches seen, including skipped ones
    params: Params  # the leaves being trained
    frozen: Params  # leaves without gradient and optimiser state; {} if everything is trained
    opt_state: Any
    ema: Params | None  # exponential moving average of `params`, or None
    skipped: jax.Array  # [] int32: consecutive steps skipped because of a non-finite gradient


def create(params: Params, tx: optax.GradientTransformation, *, frozen: Params | None = None, ema: bool) -> TrainState:
    """Return the state before the first step; `tx.init` sees `params`, so give pretrained ones here."""
    # no two leaves may share a buffer: the step would donate it twice
    counters = [jnp.zeros((), jnp.int32) for _ in range(2)]
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(counters[0], params, frozen or {}, tx.init(params), mean, counters[1])


def init_params(
    model: nn.Module, inputs: Sequence[Any], key: jax.Array, mesh: Mesh, *, rngs: tuple[str, ...] = ("params",)
) -> Params:
    """Initialise a model's parameters randomly; each device makes only its own shard.

    Args:
        model: the module to initialise.
        inputs: example inputs; only their shapes and dtypes matter.
        key: random key of the initialisation.
        mesh: mesh of the run.
        rngs: names of the random streams that the model uses in its initialisation; all get `key`.
    """
    shapes = _shapes(inputs)
    place = sharding.shardings(jax.eval_shape(partial(_boxed, model, shapes, rngs), key), mesh)
    # model and shapes are static, so any number of initialisations of one model compiles once
    return jax.jit(_drawn, static_argnums=(0, 1, 2), out_shardings=place)(model, shapes, rngs, key)


def layout(model: nn.Module, inputs: Sequence[Any], mesh: Mesh, *, rngs: tuple[str, ...] = ("params",)) -> Params:
    """Return the shapes and shardings of what `init_params` makes, without making it."""
    boxed = jax.eval_shape(partial(_boxed, model, _shapes(inputs), rngs), jax.eval_shape(jax.random.key, 0))
    place = sharding.shardings(boxed, mesh)
    shaped: Params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), meta.unbox(boxed), place
    )
    return shaped


def traced(make_params: Callable[[], tuple[Params, Params]], model_layout: Params, mesh: Mesh) -> tuple[Params, Params]:
    """Return the shapes and shardings of what `make_params` makes; it is only traced, nothing is read or computed.

    A leaf, or a slice of a stacked leaf, is sharded as the model's leaf at its path; other leaves are replicated.
    """
    known = tree.flatten(model_layout)

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        like = known.get(path)
        where = like.sharding if like is not None and len(like.shape) == len(leaf.shape) else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    trained, frozen = jax.eval_shape(make_params)
    return tree.map_with_path(place, trained), tree.map_with_path(place, frozen)


def abstract(
    create_state: Callable[[Params, Params], TrainState], params: Params, frozen: Params, mesh: Mesh
) -> TrainState:
    """Return the state's shapes with shardings, to restore a checkpoint or to create a new state.

    Leaves of the optimiser state and of the EMA at a parameter's path and with its shape are sharded as that
    parameter; everything else is replicated.
    """
    shapes = jax.eval_shape(create_state, params, frozen)
    # in a partly frozen stack, the lower layers in one tree have the same path as the upper layers in the other
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
    """Create the state with every leaf directly in its shards."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract(create_state, params, frozen, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(create_state, out_shardings=layout)(params, frozen)


_Shapes = tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]


def _shapes(inputs: Sequence[Any]) -> _Shapes:
    return tuple((tuple(array.shape), np.dtype(array.dtype)) for array in inputs)


def _boxed(model: nn.Module, shapes: _Shapes, rngs: tuple[str, ...], key: jax.Array) -> Any:
    inputs = (jnp.zeros(shape, dtype) for shape, dtype in shapes)
    return model.init(dict.fromkeys(rngs, key), *inputs, mutable=["params"])["params"]


def _drawn(model: nn.Module, shapes: _Shapes, rngs: tuple[str, ...], key: jax.Array) -> Params:
    return meta.unbox(_boxed(model, shapes, rngs, key))


def _key(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
