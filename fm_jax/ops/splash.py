"""Attention on a TPU in one kernel of JAX's Pallas library, splash attention: `ops/attention.py` decides when.

XLA's form writes the scores [B, H, T, S] to memory in float32 and reads them back, several times; the kernel goes over
them in blocks that stay on the chip, skips blocks that no query sees, and keeps for the gradient only its inputs, its
output and one number per query. It is compiled and interpreted by tests here, but was not run on a TPU.

XLA's partitioner cannot split a kernel, so under a mesh each device runs it on its part, by `shard_map`: this file is
the one place that says which part. Every query needs all keys of its own row and its own head, and nothing else.
Rows are split as the batch is, heads as the projections' are, queries (not keys) as time is.

Dims: B batch, T queries, S keys, G key-value heads, H query heads (a multiple of G), K head width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import sharding
from fm_jax.core.mesh import AXES

_LANE = 128  # numbers in a row of a TPU's registers: every block is a multiple
_BLOCKS = (512, 256, 128)
# A block costs about a third of a microsecond to start, so few queries would gain little. By the vendor's rates, at 512
# of width 64, XLA's form moves 1 MiB of scores per head several times, the kernel 64 KiB four times. Not measured.
_LEAST = 512
_NOBODY = jnp.iinfo(jnp.int32).min  # a segment that no query has
_ONE_PASS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


class _Split(NamedTuple):
    """The mesh axes that split each dimension; None: it is whole on every device."""

    batch: Any
    heads: Any
    time: Any


def fits(query: jax.Array, key: jax.Array, is_causal: bool) -> bool:
    """Return whether the kernel takes [B, T, H, K] and [B, S, G, K] in this place, and is worth it.

    It takes float32 and bfloat16, and lengths in whole blocks. Its compiler refuses products of bfloat16 if a higher
    precision is asked for. Each device must hold whole heads. Without a mesh in scope nothing says how arrays are split
    over several devices, and XLA must find out.
    """
    (_, time, heads, _), (_, length, groups, _) = query.shape, key.shape
    half = query.dtype == jnp.bfloat16
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if query.dtype != key.dtype or not (half or query.dtype == jnp.float32) or (half and asked not in _ONE_PASS):
        return False
    if min(time, length) < _LEAST or time % _LANE or length % _LANE or (is_causal and time != length):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if set(AXES) <= set(mesh.auto_axes):
        return heads % (groups * _copies(groups)) == 0
    return len(mesh.manual_axes) == len(mesh.axis_names) if mesh.axis_names else jax.device_count() == 1


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | jax.Array = 0,
    windows: Sequence[int] = (),
    segments: jax.Array | None = None,
    keys: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend as `ops.attention` does: [B, T, H, K], [B, S, G, K], [B, S, G, K] -> [B, T, H, K].

    The scaled queries are rounded to their dtype; XLA's form scales the scores in float32. A row of `keys` without a
    real one gives the mean of its values, as in XLA's form, but no gradient.

    Args:
        query: the queries.
        key: the keys, one head for several heads of queries.
        value: the values.
        scale: factor of the scores.
        is_causal: a query sees no later keys.
        window: if causal, number of last keys that a query sees, 0 for all; [] if it is known only when running.
        windows: the values that such a window may have; there is one kernel for each.
        segments: [B, T], of queries and keys; a query sees those of its own.
        keys: [B, S], True where a key is real.
        interpret: run the kernel on a CPU, operation by operation.
    """
    copies = _copies(key.shape[2])
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    if copies > 1:  # fewer key heads than devices that split the heads: each gets a copy of the one that it needs
        key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    split = _split(query)
    sizes = sorted(set(windows)) if isinstance(window, jax.Array) else [window]
    kernels = [_kernel(split, query, key, is_causal, size, interpret) for size in sizes]
    choice = (jnp.array(sizes) == window).argmax() if len(sizes) > 1 else jnp.array(0)
    ids = _ids(query.shape, key.shape, segments, keys)
    run: Callable[..., jax.Array] = _run
    if set(AXES) <= set(jax.sharding.get_abstract_mesh().auto_axes):
        rows, all_keys = PartitionSpec(*split), PartitionSpec(split.batch, split.heads)
        each = None if ids is None else (PartitionSpec(split.batch, split.time), PartitionSpec(split.batch))
        masks = [kernel.manual_sharding_spec(_blocks(split)) for kernel in kernels]
        run = jax.shard_map(
            _run,
            in_specs=(masks, PartitionSpec(), rows, all_keys, all_keys, each),
            out_specs=rows,
            check_vma=False,  # the kernel does not say along which axes its outputs vary
        )
    out = run(kernels, choice, query, key, value, ids).transpose(0, 2, 1, 3)
    if keys is None:
        return out
    # The kernel's gradient needs the sum of a row's weights, which a row of masked scores alone has lost to rounding.
    return jnp.where(keys.any(axis=1)[:, None, None, None], out, jax.lax.stop_gradient(out))


def _run(
    kernels: list[Any],
    choice: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Run the chosen kernel over the rows of one device: [B, H, T, K], [B, G, S, K], [B, G, S, K] -> [B, H, T, K]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    held = None if ids is None else SegmentIds(*ids)
    if len(kernels) == 1:
        return _rows(kernels[0], query, key, value, held)
    out: jax.Array = jax.lax.switch(choice, [partial(_rows, kernel) for kernel in kernels], query, key, value, held)
    return out


def _rows(kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, ids: Any) -> jax.Array:
    out: jax.Array = jax.vmap(kernel)(query, key, value, ids)
    return out


def _kernel(split: _Split, query: jax.Array, key: jax.Array, is_causal: bool, window: int, interpret: bool) -> Any:
    """Return the kernel of one window, a tree of the arrays that say which blocks it visits."""
    # pallas takes long to import, and only a TPU needs it
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    heads, time, length = query.shape[1], query.shape[2], key.shape[2]
    if not is_causal:
        mask: Any = library.FullMask((time, length))
    elif window:
        mask = library.LocalMask((time, length), (window - 1, 0), offset=0)
    else:
        mask = library.CausalMask((time, length))
    ways = sharding.ways("heads"), sharding.ways("time") if split.time else 1
    rows, columns = _block(time // ways[1]), _block(length)
    return library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        head_shards=ways[0],
        q_seq_shards=ways[1],
        interpret=interpret,
    )


def _ids(
    queries: tuple[int, ...], keyed: tuple[int, ...], segments: jax.Array | None, keys: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """Return segments of queries [B, T] and of keys [B, S], where a key that is not real has one of its own."""
    if segments is None and keys is None:
        return None
    if segments is None:
        mine, theirs = (jnp.zeros((shape[0], shape[2]), jnp.int32) for shape in (queries, keyed))
    else:
        mine = theirs = segments.astype(jnp.int32)
    return mine, theirs if keys is None else jnp.where(keys, theirs, _NOBODY)


def _split(query: jax.Array) -> _Split:
    """Return how the mesh in scope splits [B, H, T, K]; a dimension that its axes do not divide stays whole."""

    def axis(name: str, size: int) -> Any:
        return sharding.spec((name,))[0] if size % sharding.ways(name) == 0 else None

    batch, heads, time, _ = query.shape
    return _Split(axis("batch", batch), axis("heads", heads), axis("time", time // _LANE))


def _blocks(split: _Split) -> NamedSharding:
    """Return how the table of blocks [H, T / block, S / block] is split."""
    return NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(split.heads, split.time))


def _block(length: int) -> int:
    return next(block for block in _BLOCKS if length % block == 0)


def _copies(groups: int) -> int:
    """Return how many copies of each key-value head give every part of the heads one of its own; mostly 1."""
    ways = sharding.ways("heads")
    return ways // gcd(groups, ways)
