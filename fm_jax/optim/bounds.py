"""Keep parameters inside bounds: after each step they are moved to the nearest value that is allowed."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params

CLIP_SCALE = {"scale": (0.0, math.log(100.0))}
"""Bounds of the logarithm of CLIP's scale: cosines are multiplied by 1 to 100 (Radford et al. 2021, section 2.5)."""


def bounded(
    tx: optax.GradientTransformation, bounds: Mapping[str, tuple[float, float]], params: Params
) -> optax.GradientTransformation:
    """Return an optimiser whose updates leave some parameters between bounds.

    Clipping the value itself, after the step, lets it come back: where a model clips it in its forward pass, the
    gradient beyond the bound is zero.

    Args:
        tx: the optimiser.
        bounds: path of a leaf -> (least, most).
        params: the trained leaves (arrays or abstract).

    Raises:
        ConfigError: no leaf has such a path, or the least is above the most.
    """
    paths = tree.flatten(params).keys()
    for path, (least, most) in bounds.items():
        if path not in paths:
            raise ConfigError(f"bounds name {path}, which is not a parameter; some are {', '.join(sorted(paths)[:5])}")
        if not least <= most:
            raise ConfigError(f"the bounds of {path} are {least} and {most}: the first must not be above the second")

    def update(updates: Params, state: optax.EmptyState, params: Params | None) -> tuple[Params, optax.EmptyState]:
        def bound(path: str, change: jax.Array, value: jax.Array) -> jax.Array:
            if path not in bounds:
                return change
            return jnp.clip(value + change, *bounds[path]) - value

        values = tree.flatten(params or {})
        moved = {path: bound(path, change, values[path]) for path, change in tree.flatten(updates).items()}
        return tree.unflatten(moved), state

    return optax.chain(tx, optax.GradientTransformation(lambda _: optax.EmptyState(), update))
