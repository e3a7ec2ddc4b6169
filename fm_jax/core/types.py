"""Type aliases that every package uses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = dict[str, Any]
"""Nested dict of arrays, as Flax returns it under the key "params", without boxes."""

Batch = Mapping[str, Any]
"""Field name -> array whose first axis is the batch."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, weight). Sums and weights add up over microbatches, devices and hosts; division happens once."""

STATISTICS = "statistics/"
"""Prefix of a running statistic's path among the metrics: its mean is the leaf's next value and is not logged."""

LossFn = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Metrics]]
"""(params, batch, rng) -> (sum, weight, metrics). `rng=None` means evaluation: no dropout, no noise."""
