"""Scaled dot-product attention, dispatched in this one place.

Legend: B batch, T queries, S keys, G key-value heads, R query heads per key-value head (H = G·R), K head width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.core.mesh import platform
from fm_jax.ops import masking, splash

MASKED = -1e30  # finite, so that a fully masked row gives no NaN


def scores(query: jax.Array, key: jax.Array, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """Return scale · q·k + bias: [B, T, H, K], [B, S, G, K], [B or 1, H, T, S] -> [B, H, T, S] in float32.

    Heads go before time and the queries that share a key head are flattened into one matrix product: on CPU
    that halves the gradient's time against `jax.nn.dot_product_attention` (37 against 69 ms at
    B8 T256 H4 K64), and it is the batched product that a GPU's library runs anyway.
    """
    batch, time, heads, width = query.shape
    groups = key.shape[2]
    grouped = query.transpose(0, 2, 1, 3).reshape(batch, groups, heads // groups * time, width)
    product = jnp.matmul(grouped, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scaled = product.reshape(batch, heads, time, key.shape[1]) * scale
    return scaled if bias is None else scaled + bias.astype(jnp.float32)


def pattern(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return attention weights [B, H, T, S] in float32; mask is [B or 1, T, S], True where a query may attend."""
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED)
    return _softmax(scores)


@jax.custom_jvp
def _softmax(scores: jax.Array) -> jax.Array:
    """Return the softmax over the last axis; in a scan, jax's own would store its output twice for the gradient."""
    return jax.nn.softmax(scores, axis=-1)


@_softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    weights, (change,) = _softmax(*primals), tangents
    return weights, weights * (change - (weights * change).sum(axis=-1, keepdims=True))


@partial(jax.checkpoint, prevent_cse=False)
def mix(pattern: jax.Array, value: jax.Array) -> jax.Array:
    """Return the weighted values: [B, H, T, S], [B, S, G, K] -> [B, T, H, K] in the values' dtype.

    The backward pass reads `pattern`, which the softmax keeps for its own gradient: without the checkpoint a scan would
    store the reshaped copy beside it.
    """
    batch, heads, time, length = pattern.shape
    groups, width = value.shape[2:]
    grouped = pattern.astype(value.dtype).reshape(batch, groups, heads // groups * time, length)
    mixed = jnp.matmul(grouped, value.transpose(0, 2, 1, 3))
    return mixed.reshape(batch, heads, time, width).transpose(0, 2, 1, 3)


def visible(
    time: int,
    length: int,
    *,
    is_causal: bool = False,
    window: int | jax.Array = 0,
    windows: Sequence[int] = (),
    segments: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array | None:
    """Return the mask [B or 1, T, S] that the same arguments of `attention` describe; None: all see all."""
    mask: jax.Array | None = None
    if is_causal:
        rows, columns = jnp.arange(time), jnp.arange(length)
        mask = masking.causal(rows, columns)
        if isinstance(window, jax.Array) or window:
            mask &= masking.window(rows, columns, window)
        mask = mask[None]
    if segments is not None:
        same = masking.same_segment(segments, segments)
        mask = same if mask is None else mask & same
    if keys is not None:
        real = jnp.broadcast_to(keys[:, None], (len(keys), time, length))
        mask = real if mask is None else mask & real
    return mask


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    window: int | jax.Array = 0,
    windows: Sequence[int] = (),
    segments: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Attend: [B, T, H, K], [B, S, G, K], [B, S, G, K] -> [B, T, H, K].

    What queries see is described by `is_causal` to `keys`, so that a fused kernel can skip blocks instead of reading a
    mask; or, where that is not enough, by a complete `mask` alone. The form depends on the devices of the mesh in
    scope. It is chosen when the program is traced: if it were when it is lowered, the gradient would keep what any form
    needs, so XLA's scores beside the kernel that avoids them.

    - NVIDIA GPU: cuDNN's flash attention, for half precision without a bias if it supports the shapes.
    - TPU: splash attention, without a mask or a bias, for what `ops/splash.py` says that it takes.
    - Everything else, and all of it on a CPU: XLA. Dropout, and edits of scores or patterns, need this form's parts.

    The fused kernels have a gradient, but no forward-mode derivative (`jax.jvp`).

    Args:
        query: the queries.
        key: the keys, one head for several heads of queries.
        value: the values.
        scale: factor of the scores.
        mask: [B or 1, T, S], True where a query may attend.
        bias: [B or 1, H, T, S], added to the scaled scores.
        is_causal: a query sees the keys at its own index and before.
        window: if causal, number of last keys that a query sees, 0 for all; [] if each layer of a stack has its own.
        windows: the values that such a window may have.
        segments: [B, T] of both queries and keys; a query sees those of its own.
        keys: [B, S], True where a key is real.
    """
    seen: dict[str, Any] = {"is_causal": is_causal, "window": window, "windows": windows}
    seen |= {"segments": segments, "keys": keys}
    if mask is None and bias is None and platform() == "tpu" and splash.fits(query, key, is_causal):
        return splash.attend(query, key, value, scale=scale, **seen)
    in_flags = segments is None and keys is None and isinstance(window, int)  # all that cuDNN knows but a mask
    if mask is None and not in_flags:
        mask = visible(query.shape[1], key.shape[1], **seen)
    if bias is None and platform() == "gpu" and _fits_cudnn(query, key):
        return _cudnn(query, key, value, scale, mask, is_causal, window)
    if mask is None:
        mask = visible(query.shape[1], key.shape[1], **seen)
    return mix(pattern(scores(query, key, scale, bias), mask), value)


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    mask: jax.Array | None,
    is_causal: bool,
    window: int | jax.Array,
) -> jax.Array:
    """Run cuDNN's kernel; a mask is complete, so the other arguments count only without one."""
    last = window if mask is None and isinstance(window, int) else 0
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if mask is None else mask[:, None],
        scale=scale,
        is_causal=mask is None and is_causal,
        local_window_size=(last - 1, 0) if last else None,
        implementation="cudnn",
    )


def _fits_cudnn(query: jax.Array, key: jax.Array) -> bool:
    """Return whether cuDNN has a kernel, and a gradient: half precision, head width 8, 16 … 128, even lengths.

    JAX refuses the gradient of odd lengths: without a bias too, because it then passes an empty one.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and even
