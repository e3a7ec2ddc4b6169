"""Matrix products in the form that each backend runs fastest."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fm_jax.core.mesh import platform

# Longest sum that XLA may run in one accumulator on a CPU when the highest precision is asked for.
BLOCK = 384


def flat_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> jax.Array:
    """Contract the last axis of `lhs` [..., D] with the first of `rhs` [D, F] -> [..., F].

    A replacement for `nn.Dense(dot_general=...)` that flattens the leading axes: XLA on CPU runs the gradient of
    [8, 256, 256] @ [256, 1024] in 73 ms, of [2048, 256] @ [256, 1024] in 25 ms; on an accelerator the reshape costs
    nothing. If a mesh splits time over its sequence axis, flattening would merge two split axes, so nothing is
    flattened.

    At the highest precision (`jax.default_matmul_precision("highest")`) a long sum in float32 is split on the CPU, see
    `_in_blocks`. On a GPU or a TPU the same setting keeps XLA from rounding float32 inputs to TF32 or bfloat16.
    """
    contract, batch = dimension_numbers
    plain = tuple(map(tuple, contract)) == ((lhs.ndim - 1,), (0,)) and not any(map(tuple, batch))
    mesh = jax.sharding.get_abstract_mesh()
    blocks = plain and mesh.empty and _is_highest(precision, lhs.dtype)
    split = not mesh.empty and mesh.shape.get("sequence", 1) > 1
    if not plain or split:
        return jax.lax.dot_general(
            lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
        )
    flat = lhs.reshape(math.prod(lhs.shape[:-1]), lhs.shape[-1])
    product = _in_blocks if blocks else _wide_gradient if platform() == "cpu" else jnp.matmul
    out = product(flat, rhs, precision=precision, preferred_element_type=preferred_element_type)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


def _is_highest(precision: Any, dtype: Any) -> bool:
    """Say whether a product runs in float32 on the CPU at the highest precision, given here or as jax's default."""
    default = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    wanted = default if precision is None else precision
    highest = wanted is not None and jax.lax.Precision(wanted) == jax.lax.Precision.HIGHEST
    return highest and dtype == jnp.float32 and jax.default_backend() == "cpu"


def _wide_gradient(lhs: jax.Array, rhs: jax.Array, precision: Any, preferred_element_type: Any) -> jax.Array:
    """Multiply [N, D] @ [D, F]; the gradient of `rhs` is computed with fewer rows than columns, and turned if D > F.

    XLA on the CPU takes longer for a tall gradient (one core, jax 0.10.2, milliseconds tall / wide and turned): 12.0 /
    8.0 for N 1576, D 1024, F 256; 65 / 43 for 1024, 8192, 256; 52 / 46 for 1024, 3072, 768; 3.6 / 3.3 for 784, 1152,
    192. Only the barrier keeps XLA from turning the operands instead of the result.
    """
    return _product(precision, preferred_element_type, lhs, rhs)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(precision: Any, dtype: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.matmul(lhs, rhs, precision=precision, preferred_element_type=dtype)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(precision: Any, dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    (lhs, rhs), (lhs_change, rhs_change) = primals, tangents
    options = {"precision": precision, "preferred_element_type": dtype}
    out = jnp.matmul(lhs, rhs, **options)
    changes = []
    if not isinstance(lhs_change, SymbolicZero):
        changes.append(jnp.matmul(lhs_change, rhs, **options))
    if not isinstance(rhs_change, SymbolicZero):
        # Linear in the change, so its transpose is what matters: a product, the barrier and, if turned, a transpose.
        turned = rhs.shape[0] > rhs.shape[1]
        held = jax.lax.optimization_barrier(rhs_change.T if turned else rhs_change)
        changes.append(jax.lax.dot_general(lhs, held, (((1,), (int(turned),)), ((), ())), **options))
    return out, sum(changes[1:], changes[0])


def _in_blocks(lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
    """Multiply [N, D] @ [D, F] as a sum of products over at most `BLOCK` of D.

    XLA on the CPU adds some 700 products in one float32 accumulator, MKL about half as many. A checkpoint with massive
    activations shows it: on SmolLM2-135M the root-mean-square error of the logits against float64 is 2.0 times torch's,
    with blocks 1.03 times. They cost 16 % of its forward pass over 256 tokens (`experiments/benchmarks/precision.py`),
    so they are not the default.
    """
    count = -(-lhs.shape[1] // BLOCK)
    edges = [lhs.shape[1] * block // count for block in range(count + 1)]
    blocks = [jnp.matmul(lhs[:, i:j], rhs[i:j], **options) for i, j in itertools.pairwise(edges)]
    return sum(blocks[1:], blocks[0])
