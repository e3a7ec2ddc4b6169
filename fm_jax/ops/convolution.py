"""Convolution over images, dispatched in this one place.

Dims: B batch, H height, W width, C channels in, F channels out, H' × W' the output's map, h × w the kernel, T its taps.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from fm_jax.ops.matmul import flat_dot_general
from fm_jax.ops.windows import Axis, Padding, axes, shifts


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding) -> jax.Array:
    """Convolve [B, H, W, C] with a kernel [h, w, C, F] to [B, H', W', F].

    It is `lax.conv_general_dilated`, except on a CPU in two cases, where it is a matrix product. Both compute the same
    sums in another order. The form is chosen when the program is lowered, so a program compiled on a CPU for another
    platform has that platform's form.

    1. Small maps. XLA's simplifier swaps the operands of a convolution whose window has more places than its image,
       which reverses the window, and its CPU backend has no library call for reversed windows: it emits a naive loop
       (or jax 0.10.2 ends the process, as for the input's gradient of 4×2 at stride 2 on 4×4, padded by 1).
       The gradients are convolutions too, with h × w over H' × W' and with H' × W' over H × W. CPU milliseconds of
       3×3, batch 16, 512 channels, convolution / product (jax 0.10.2, two cores):

       | map, stride | forward | input's gradient | kernel's gradient |
       |---|---|---|---|
       | 2×2, 1 | 270 / 3.9 | 276 / 6.1 | 4.4 / 6.1 |
       | 4×4, 2 | 5.7 / 3.8 | 300 / 6.2 | 4.6 / 5.5 |
       | 4×4, 1: not swapped | 13.3 / 12.8 | 19.2 / 14.9 | 13.8 / 15.0 |

       On maps that are not swapped products gain little at 512 channels and cost 1.5 to 2 times as much at 64.
    2. Kernels of 1×1: all three convolutions together take 1.2 to 2.8 times as long as the products.
    """
    forms = [partial(form, stride=stride, padding=padding) for form in (product, direct)]
    sides = axes(x.shape[1:3], kernel.shape[:2], stride, padding)
    if kernel.shape[:2] != (1, 1) and not _is_swapped(x.shape, kernel.shape, sides):
        return forms[1](x, kernel)
    # The form not taken leaves nothing in the program, but a scan over layers would save what the gradients of both
    # forms need. `checkpoint` makes that the inputs alone, not the patches.
    cpu = jax.checkpoint(forms[0], prevent_cse=False)
    out: jax.Array = jax.lax.platform_dependent(x, kernel, cpu=cpu, default=forms[1])
    return out


def direct(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding) -> jax.Array:
    """Compute `convolve` by `lax.conv_general_dilated`."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


def product(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding) -> jax.Array:
    """Compute `convolve` as a matrix product of patches [B · H' · W', T · C] with the kernel [T · C, F]."""
    # At least float32, for the input's gradient adds up what T taps give: in bfloat16 each sum would be rounded.
    wide = jnp.promote_types(x.dtype, jnp.float32) if math.prod(kernel.shape[:2]) > 1 else x.dtype
    shifted, seen = shifts(x.astype(wide), kernel.astype(wide), stride=stride, padding=padding)
    if len(shifted) == 1:
        return flat_dot_general(shifted[0], seen[0, 0], (((3,), (0,)), ((), ()))).astype(x.dtype)
    # T and C stay two axes, for a mesh may split C: merged, the partitioner would have to gather it.
    patches = jnp.stack(shifted, axis=3).reshape(-1, len(shifted), x.shape[-1])
    taps = seen.reshape(len(shifted), *seen.shape[2:])
    out = jax.lax.dot_general(patches, taps, (((1, 2), (0, 1)), ((), ())))
    return out.reshape(*shifted[0].shape[:3], kernel.shape[-1]).astype(x.dtype)


def _is_swapped(image: tuple[int, ...], kernel: tuple[int, ...], sides: tuple[Axis, Axis]) -> bool:
    """Say whether XLA swaps the operands of this convolution or of one of its gradients: see `convolve`."""
    window, inside, outside = math.prod(kernel[:2]), math.prod(image[1:3]), math.prod(axis.out for axis in sides)
    return outside > 0 and (window > min(inside, outside) or outside > inside)
