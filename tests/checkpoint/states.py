"""States for the tests of this room: every kind of leaf that a run has, on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class State(struct.PyTreeNode):
    step: jax.Array
    params: dict
    frozen: dict
    opt_state: optax.OptState
    ema: dict | None


@partial(jax.jit, static_argnames=("width", "ema", "frozen"))
def make(seed: int = 0, *, width: int = 16, ema: bool = False, frozen: bool = True) -> State:
    """A state with every kind of leaf a run has: stacked, bfloat16, int32 scalars, nested tuples, empty parts."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "blocks": {"up": {"kernel": jax.random.normal(keys[0], (2, 8, width))}},
        "head": {"kernel": jax.random.normal(keys[1], (width, 8)).astype(jnp.bfloat16)},
    }
    fixed = {"embed": {"tokens": jax.random.normal(keys[2], (24, width))}} if frozen else {}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 10)))
    tx = optax.MultiSteps(tx, 2)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), params)
    opt_state = tx.update(grads, tx.init(params), params)[1]
    mean = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), params) if ema else None
    return State(jnp.int32(seed), params, fixed, opt_state, mean)


def shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def spread(state, devices: int):
    """Lay a state out over a mesh: every axis that divides, on the last dimension."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def where(leaf):
        split = leaf.ndim and leaf.shape[-1] % devices == 0
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "fsdp") if split else P())

    return jax.device_put(state, jax.tree.map(where, state))


def assert_same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
