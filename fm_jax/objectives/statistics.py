"""Running statistics (`layers/batch_norm.py`): kept from the optimiser, and handed to the step beside the metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core import tree
from fm_jax.core.types import STATISTICS, Metrics, Params


def split(params: Params) -> tuple[Params, Params]:
    """Return (trained, running statistics); the second is {} for a model that has none."""
    found = tree.flatten(params)
    running = {path: leaf for path, leaf in found.items() if path.rpartition("/")[2] in ("mean", "var")}
    rest = {path: leaf for path, leaf in found.items() if path not in running}
    return tree.unflatten(rest), tree.unflatten(running)


def apply_with(
    apply: Callable[..., Any], params: Params, *inputs: Any, rng: jax.Array | None, **options: Any
) -> tuple[Any, Metrics]:
    """Apply a model in training where there is a key, in evaluation where there is none.

    Returns:
        The output, and in training the next running statistics as (sum, weight) pairs named "statistics/PATH": a loss
        adds them to its metrics, so that they are averaged over microbatches and devices as everything else is, and
        the step moves them into the state. {} for a model that has none.
    """
    if rng is None:
        return apply({"params": params}, *inputs, **options), {}
    out, new = apply({"params": params}, *inputs, rngs={"dropout": rng}, mutable=["statistics"], **options)
    found = tree.flatten(new.get("statistics", {}))
    return out, {STATISTICS + path: (value, jnp.ones(())) for path, value in found.items()}
