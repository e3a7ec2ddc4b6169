"""Depthwise convolution, dispatched in this one place.

Dims: B batch, H height, W width, C channels, k kernel size, T taps of the kernel, H' × W' the output's map.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.ops.windows import Padding, axes, planes, shifts

_GROUPS = 8  # most parts of a batch whose shares of the kernel's gradient are added tap by tap


def depthwise(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding) -> jax.Array:
    """Convolve each channel with its own filter: [B, H, W, C], [k, k, 1, C] -> [B, H', W', C].

    XLA's grouped convolution is slow on a CPU, where this is a sum of k² shifted products instead: the gradient of a
    3×3 on [32, 32, 32, 48] took 89 ms against 552. Other platforms use `lax.conv_general_dilated`. The form is chosen
    when the program is lowered, as in `ops/convolution.py`.
    """
    cpu, other = (partial(form, stride=stride, padding=padding) for form in (shifted, grouped))
    out: jax.Array = jax.lax.platform_dependent(x, kernel, cpu=cpu, default=other)
    return out


def grouped(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding) -> jax.Array:
    """Compute `depthwise` as a grouped convolution, one group per channel: [B, H, W, C] -> [B, H', W', C]."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding) -> jax.Array:
    """Compute `depthwise` as a sum of shifted products, one for each of the k² taps: [B, H, W, C] -> [B, H', W', C]."""
    sides = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    return _shifted(stride, sides, x, kernel)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _shifted(stride: int, padding: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    images, taps = shifts(x, kernel, stride=stride, padding=padding)
    total = jnp.zeros_like(images[0])
    for image, tap in zip(images, taps.reshape(-1, x.shape[-1]), strict=True):
        total = total + image * tap.reshape(1, 1, 1, -1)
    return total


@_shifted.defjvp
def _shifted_jvp(stride: int, padding: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Differentiate in forms whose transposes are fast: reverse mode runs only those.

    Without them XLA writes each of the k² shifted images and products to memory for the kernel's gradient, and checks
    the border at every pixel for the input's. CPU milliseconds, batch 16 (one core, jax 0.10.2):

    | map, channels, kernel, stride | input's gradient before / now | kernel's gradient before / now |
    |---|---|---|
    | 24×24, 144, 3×3, 1 | 0.7 / 0.8 | 6.9 / 2.4 |
    | 24×24, 144, 5×5, 2 | 10.5 / 0.9 | 6.9 / 2.3 |
    | 12×12, 240, 5×5, 1 | 4.7 / 1.5 | 9.4 / 2.8 |
    | 6×6, 672, 5×5, 1 | 3.1 / 1.2 | 6.4 / 2.2 |
    """

    @jax.checkpoint  # else the shifted images would be saved for the gradient
    def change(x: jax.Array, kernel: jax.Array, dx: jax.Array, dkernel: jax.Array) -> jax.Array:
        return _spread(stride, padding, dx, kernel) + _grouped_taps(stride, padding, x, dkernel)

    return _shifted(stride, padding, *primals), change(*primals, *tangents)


def _spread(stride: int, padding: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute `depthwise` from the side of the input, each pixel added to all outputs that see it.

    The transpose reads the output's gradient, padded once, as `shifted` reads the input.
    """
    rows, columns = axes(x.shape[1:3], kernel.shape[:2], stride, padding)
    parts = planes(x, rows, columns, stride)
    # places in a plane from the first that an output sees to the last
    far = [(axis.taps.stop - 1) // stride for axis in (rows, columns)]
    total = jnp.zeros((), x.dtype)
    for row in rows.taps:
        for column in columns.taps:
            (down, top), (right, left) = divmod(row, stride), divmod(column, stride)
            product = parts[top][left] * kernel[row, column].reshape(1, 1, 1, -1)
            edges = [(far[0] - down, down), (far[1] - right, right)]
            total = total + jnp.pad(product, ((0, 0), *edges, (0, 0)))
    total = jax.lax.optimization_barrier(total)  # else each tap of the transpose would pad for itself
    return total[:, far[0] : far[0] + rows.out, far[1] : far[1] + columns.out]


def _grouped_taps(stride: int, padding: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute `depthwise` in up to `_GROUPS` parts of the batch, with a copy of the taps for every row and pixel.

    The transpose adds the groups' shares of a copy's gradient, then all copies: one reduction for all taps.
    """
    images, taps = shifts(x, kernel, stride=stride, padding=padding)
    batch, channels = images[0].shape[0], x.shape[-1]
    groups = max(count for count in range(1, _GROUPS + 1) if batch % count == 0)
    rows = batch // groups
    copies = jnp.broadcast_to(taps.reshape(-1, 1, 1, 1, channels), (len(images), rows, *images[0].shape[1:]))
    each = jax.lax.split(copies, (1,) * len(images))  # its transpose is one concatenation
    parts = []
    for start in range(0, batch, rows):
        products = [image[start : start + rows] * copy[0] for image, copy in zip(images, each, strict=True)]
        parts.append(sum(products[1:], products[0]))
    return jnp.concatenate(parts)
