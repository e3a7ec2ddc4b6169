"""Type aliases that every package uses."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax

Params = dict[str, Any]
"""Nested dict of arrays, as Flax returns it under the key "params", without boxes."""


@runtime_checkable
class Headed(Protocol):
    """A model with a task's head on a backbone, whose parameters are at "backbone/…"."""

    @property
    def backbone(self) -> Any:
        """Return the model without its head."""
        ...


@runtime_checkable
class Tapped(Protocol):
    """A model whose activations have names (`layers/tap.py`)."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the names of the activations that can be read and edited."""
        ...


@runtime_checkable
class Featured(Protocol):
    """A model that computes one feature vector per image."""

    def features(self, image: jax.Array, *, tap: Any = None) -> jax.Array:
        """Return the features [B, D] of images [B, H, W, channels]."""
        ...


def backbone(module: nn.Module) -> Any:
    """Return the model without its head, or the module itself if it has none."""
    return module.backbone if isinstance(module, Headed) else module


Batch = Mapping[str, Any]
"""Field name -> array whose first axis is the batch."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, weight). Sums and weights add up over microbatches, devices and hosts; division happens once."""

Updates = dict[str, tuple[jax.Array, jax.Array]]
"""Path of a frozen leaf -> (sum, weight), added up as metrics are; the mean is the leaf's next value."""


class Loss(NamedTuple):
    """Result of a loss function on a batch; every part adds up over microbatches, devices and hosts."""

    sum: jax.Array  # [], sum of the objective; the step uses the gradient of sum / weight
    weight: jax.Array  # []
    metrics: Metrics
    # leaves that change without a gradient: running statistics, codebook usage, EMA teachers
    updates: Updates = {}  # noqa: RUF012 (never mutated, and None would not be a tree of pairs)


LossFn = Callable[[Params, Batch, jax.Array | None, jax.Array | None], Loss]
"""(params, batch, rng, step) -> Loss.

`rng=None` means evaluation: no dropout, no noise, no updates. `step` [] int32 is the number of training steps before
this one, for schedules (such as a temperature); None in evaluation.
"""
