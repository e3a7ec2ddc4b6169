"""Depthwise convolution, dispatched in this one place."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fm_jax.core.mesh import platform


def depthwise(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]]
) -> jax.Array:
    """Convolve each channel with its own filter: [B, H, W, C], [k, k, 1, C] -> [B, H', W', C].

    XLA's grouped convolution is slow on a CPU, where this is a sum of k² shifted products instead: the gradient of a
    3×3 on [32, 32, 32, 48] took 89 ms against 552. Other backends use `lax.conv_general_dilated`.
    """
    if platform() == "cpu":
        return shifted(x, kernel, stride=stride, padding=padding)
    return grouped(x, kernel, stride=stride, padding=padding)


def grouped(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]]
) -> jax.Array:
    """Compute `depthwise` as a grouped convolution, one group per channel: [B, H, W, C] -> [B, H', W', C]."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]]
) -> jax.Array:
    """Compute `depthwise` as a sum of k² shifted products: [B, H, W, C] -> [B, H', W', C]."""
    size = kernel.shape[:2]
    pads = (
        jax.lax.padtype_to_pads(x.shape[1:3], size, (stride, stride), padding) if isinstance(padding, str) else padding
    )
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    out = [(extent - side) // stride + 1 for extent, side in zip(x.shape[1:3], size, strict=True)]
    total = jnp.zeros((x.shape[0], *out, x.shape[-1]), x.dtype)
    for row in range(size[0]):
        for column in range(size[1]):
            rows = slice(row, row + stride * (out[0] - 1) + 1, stride)
            columns = slice(column, column + stride * (out[1] - 1) + 1, stride)
            total = total + x[:, rows, columns] * kernel[row, column].reshape(1, 1, 1, -1)
    return total
