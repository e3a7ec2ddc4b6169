"""Dense layers whose parameters carry logical axis names, and the usual initialiser."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.ops.matmul import flat_dot_general

Initializer = Callable[..., jax.Array]


def normal(std: float, gain: float = 1.0) -> Initializer:
    """Initialise from N(0, (gain · std)²); std 0 means 1/sqrt(fan_in), which small widths need."""
    if std == 0.0:
        return nn.initializers.variance_scaling(gain**2, "fan_in", "normal", in_axis=-2, out_axis=-1)
    return nn.initializers.normal(gain * std)


def dense(
    features: int,
    axes: tuple[str | None, str | None],
    *,
    bias: bool,
    init: Initializer,
    dtype: Any,
    out_dtype: Any = None,
    name: str | None = None,
) -> nn.Dense:
    """Make a dense layer [..., D] -> [..., features]; `axes` are the logical names of (in, out).

    The product is accumulated and returned in `out_dtype` if given (float32 for logits), else in `dtype`.
    """
    product = partial(flat_dot_general, preferred_element_type=out_dtype) if out_dtype else flat_dot_general
    return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dtype=dtype,
        param_dtype=jnp.float32,
        dot_general=product,
        name=name,
    )
