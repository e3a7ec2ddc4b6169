"""Dense layers whose parameters carry logical axis names, and the initialisers of the field."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.ops.matmul import flat_dot_general

Initializer = Callable[..., jax.Array]


def normal(std: float) -> Initializer:
    """Draw from N(0, std²); std 0 means the fan-in rule 1/sqrt(fan_in), which small widths need."""
    if std == 0.0:
        return nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1)
    return nn.initializers.normal(std)


def dense(
    features: int,
    axes: tuple[str | None, str | None],
    *,
    bias: bool,
    init: Initializer,
    dtype: Any,
    name: str | None = None,
) -> nn.Dense:
    """Make a dense layer [..., D] -> [..., features]; `axes` are the logical names of (in, out)."""
    return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dtype=dtype,
        param_dtype=jnp.float32,
        dot_general=flat_dot_general,
        name=name,
    )
