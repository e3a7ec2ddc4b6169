"""Type aliases that every package uses."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax

Params = dict[str, Any]
"""Nested dict of arrays, as Flax returns it under the key "params", without boxes."""


@runtime_checkable
class Headed(Protocol):
    """A task's head on a model; the parameters of the model below it stand under "backbone/…"."""

    @property
    def backbone(self) -> Any:
        """Return the model without the head."""
        ...


@runtime_checkable
class Tapped(Protocol):
    """A model whose activations have names (`layers/tap.py`)."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Name the activations that can be read and edited."""
        ...


@runtime_checkable
class Featured(Protocol):
    """A model that makes one vector of an image."""

    def features(self, image: jax.Array, *, tap: Any = None) -> jax.Array:
        """Return the features [B, D] of images [B, H, W, channels]."""
        ...


def backbone(module: nn.Module) -> Any:
    """Return the model without its head: the module itself where it has none."""
    return module.backbone if isinstance(module, Headed) else module


Batch = Mapping[str, Any]
"""Field name -> array whose first axis is the batch."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, weight). Sums and weights add up over microbatches, devices and hosts; division happens once."""

Updates = dict[str, tuple[jax.Array, jax.Array]]
"""Path of a frozen leaf -> (sum, weight), added up as metrics are; the mean is the leaf's next value."""


class Loss(NamedTuple):
    """What a loss function makes of a batch; everything in it adds up over microbatches, devices and hosts."""

    sum: jax.Array  # of the objective; its gradient is the step's, once divided by the weight
    weight: jax.Array
    metrics: Metrics
    # running statistics, codebook usage, teachers: what changes without a gradient
    updates: Updates = {}  # noqa: RUF012 (nobody writes to a tuple's parts, and None would be no tree of pairs)


LossFn = Callable[[Params, Batch, jax.Array | None, jax.Array | None], Loss]
"""(params, batch, rng, step) -> Loss.

`rng=None` means evaluation: no dropout, no noise, no updates. `step` [] int32 counts the training steps before this
one, for what follows a schedule (a temperature); None in evaluation.
"""
