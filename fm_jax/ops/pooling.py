"""Pooling over images, dispatched in this one place."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.ops.windows import axes, views


def max_pool(x: jax.Array, size: int, *, stride: int, padding: int) -> jax.Array:
    """Take the largest value of each window of `size` × `size` pixels: [B, H, W, C] -> [B, H', W', C].

    The border is padded with -inf by `padding` pixels. It is `nn.max_pool`: of equal values the first, row by row, gets
    the gradient. On a CPU it is a chain of comparisons, meant for small windows: 3×3 at stride 2 on [8, 64, 64, 64]
    with its gradient takes 4 ms, `nn.max_pool` 39 (one core, jax 0.10.2). The form is chosen when the program is
    lowered, as in `ops/convolution.py`.
    """
    cpu, other = (partial(form, size=size, stride=stride, padding=padding) for form in (compared, reduced))
    out: jax.Array = jax.lax.platform_dependent(x, cpu=cpu, default=other)
    return out


def reduced(x: jax.Array, *, size: int, stride: int, padding: int) -> jax.Array:
    """Compute `max_pool` by XLA's reduction over windows."""
    return nn.max_pool(x, (size, size), (stride, stride), ((padding, padding), (padding, padding)))


def compared(x: jax.Array, *, size: int, stride: int, padding: int) -> jax.Array:
    """Compute `max_pool` by comparing what the window's places see, one after the other."""
    rows, columns = axes(x.shape[1:3], (size, size), stride, [(padding, padding)] * 2)
    largest, *others = views(x, rows, columns, stride, fill=-jnp.inf)
    for other in others:
        # NaN is the largest of all, and stays: it is in the result of nn.max_pool, too
        largest = jnp.where((other > largest) | jnp.isnan(other), other, largest)
    return largest
