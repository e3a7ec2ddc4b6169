"""Running statistics (`layers/batch_norm.py`): kept from the optimiser, and handed to the step as updates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core import tree
from fm_jax.core.types import Params, Updates


def split(params: Params) -> tuple[Params, Params]:
    """Return (trained, running statistics); the second is {} for a model that has none."""
    flat = tree.flatten(params)
    running = {path: leaf for path, leaf in flat.items() if path.rpartition("/")[2] in ("mean", "var")}
    rest = {path: leaf for path, leaf in flat.items() if path not in running}
    return tree.unflatten(rest), tree.unflatten(running)


def apply_with(
    apply: Callable[..., Any], params: Params, *inputs: Any, rng: jax.Array | None, **options: Any
) -> tuple[Any, Updates]:
    """Apply a model in training where there is a key, in evaluation where there is none.

    Returns:
        The output, and the `updates` of a `Loss`: in training the next running statistics, each of weight 1; {} in
        evaluation, and for a model that has none.
    """
    if rng is None:
        return apply({"params": params}, *inputs, **options), {}
    out, new = apply({"params": params}, *inputs, rngs={"dropout": rng}, mutable=["statistics"], **options)
    return out, {path: (value, jnp.ones(())) for path, value in tree.flatten(new.get("statistics", {})).items()}
