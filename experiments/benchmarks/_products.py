"""Count the multiplications of a traced function: the work that no implementation of the same step can leave out.

The count is of the matrix products and convolutions of the function's jaxpr, forward and backward, times the length of
the scans round them (XLA's `cost_analysis` counts a loop's body once). A multiply-add is two FLOPs. Products with the
zeros of a convolution's padding and dilation are left out; the scores of causal attention count whole, as XLA computes
them (6 N + 12 L H K T a token, `train/profile.py`). Element-wise work and what only moves data count nothing, so the
time of these products at the rate of a large product is a lower bound, not an estimate.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fm_jax.core.errors import ConfigError


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the FLOPs of the products of a call; the arguments may be arrays or shapes.

    Raises:
        ConfigError: a product is in a loop of unknown length or in a kernel that hides it.
    """
    return _jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr(jaxpr: Any) -> float:
    return sum(map(_equation, jaxpr.eqns))


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inside = [_jaxpr(inner) for inner in _inner(params)]
    if name == "while" and any(inside):
        raise ConfigError("a product is in a while loop, whose length is unknown; its FLOPs cannot be counted")
    if not inside and ("attention" in name or "pallas" in name or name == "ragged_dot_general"):
        raise ConfigError(f"the products of {name} cannot be counted; measure where XLA's own attention is used")
    if name == "cond":
        return max(inside, default=0.0)
    return sum(inside) * (params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters, closed or open, also those in tuples (branches)."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    taps = 1
    for place, (axis, kernel_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        taps *= _taps(
            image[axis],
            kernel[kernel_axis],
            out[out_axis],
            stride=params["window_strides"][place],
            before=params["padding"][place][0],
            dilation=params["lhs_dilation"][place],
            kernel_dilation=params["rhs_dilation"][place],
        )
    channels = kernel[numbers.rhs_spec[1]]  # inputs of one group
    return 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * channels * taps


def _taps(size: int, kernel: int, out: int, *, stride: int, before: int, dilation: int, kernel_dilation: int) -> int:
    """Count the pairs (output, kernel tap) of one axis that meet a value of the input, not padding or a gap."""
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - before
    inside = (places >= 0) & (places <= (size - 1) * dilation) & (places % dilation == 0)
    return int(inside.sum())
