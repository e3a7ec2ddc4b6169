"""FLOPs of a traced step: its matrix products and convolutions, with the trips of its loops."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any


def count(jaxpr: Any) -> Counter[str]:
    """Return {dtype of the factors: FLOPs} of one call, on all devices together; a multiply-add is two FLOPs.

    A `lax.scan` counts once for each trip, a `lax.while_loop` once, a `lax.cond` as its most expensive branch. So a
    kernel's block that a causal mask may skip is counted. What rematerialisation computes again is counted: it is
    executed.
    """
    total: Counter[str] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total[_dtype(equation)] += _product(equation)
        elif name == "conv_general_dilated":
            total[_dtype(equation)] += _convolution(equation)
        elif name.startswith("dot_product_attention"):
            total[_dtype(equation)] += _fused_attention(equation)
        elif name == "cond":
            total.update(max((count(branch) for branch in params["branches"]), key=lambda held: sum(held.values())))
        else:
            trips = _trips(name, params)
            for held in _jaxprs(params):
                total.update({dtype: flops * trips for dtype, flops in count(held).items()})
    return total


def _trips(name: str, params: dict[str, Any]) -> int:
    """Return how often an equation runs the jaxprs that it holds, on all devices together."""
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _dtype(equation: Any) -> str:
    return str(equation.invars[0].aval.dtype)


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """Count 2 × outputs × taps × input channels of a group, without the zeros of an input dilated by a gradient."""
    kernel, out = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
    taps = math.prod(size for axis, size in enumerate(kernel) if axis != out)
    dense = 2 * math.prod(equation.outvars[0].aval.shape) * taps
    return dense // math.prod(equation.params["lhs_dilation"])


def _fused_attention(equation: Any) -> int:
    """Count cuDNN's kernel as its matrices, not halved for a mask: two products forward, five backward."""
    batch, queries, heads, width = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape[1]
    products = 5 if "bwd" in equation.primitive.name else 2
    return int(products * 2 * batch * heads * queries * keys * width)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield item
