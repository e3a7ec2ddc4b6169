"""Bounds of parameters: the value is clipped after the step, and can come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.optim.bounds import CLIP_SCALE, bounded
from tests.close import close

PARAMS = {"scale": jnp.float32(4.5), "inner": {"scale": jnp.ones(2)}}


def stepped(tx, gradients):
    """Return the values of `scale` after steps with these gradients of everything."""
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for gradient in gradients:
        grads = jax.tree.map(lambda leaf, slope=gradient: jnp.full_like(leaf, slope), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["scale"]))
    return np.array(seen), params


def test_a_value_stops_at_its_bound_and_comes_back():
    most = np.log(100.0)
    seen, params = stepped(bounded(optax.sgd(1.0), CLIP_SCALE, PARAMS), [-1.0, -1.0, 0.5, 9.0])
    close(seen, np.array([most, most, most - 0.5, 0.0]))
    close(params["inner"]["scale"], np.full(2, 1 + 2 - 9.5))  # another leaf is free
    free, _ = stepped(optax.sgd(1.0), [-1.0, -1.0, 0.5, 9.0])
    assert free[1] > most + 1


@pytest.mark.parametrize(
    ("bounds", "message"),
    [({"scal": (0.0, 1.0)}, "scal, which is not a parameter"), ({"scale": (1.0, 0.0)}, "bounds of scale are 1.0 and")],
)
def test_bounds_that_cannot_be_are_refused(bounds, message):
    with pytest.raises(ConfigError, match=message):
        bounded(optax.sgd(1.0), bounds, PARAMS)
