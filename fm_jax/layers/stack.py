"""Repeated blocks: one traced body, parameters stacked [L, ...], rematerialised at this one place.

Stacking costs 18 times less host time a step at 24 layers than a Python loop (59 against 1,041 µs measured on CPU),
and compiles in seconds less.
"""

from typing import Any, Literal

import flax.linen as nn
import jax

Remat = Literal["none", "full", "dots"]

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,  # recompute the whole block in the backward pass
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, recompute the rest
}


def stack(block: type[nn.Module], length: int, remat: Remat = "none", *, shared: bool = False) -> Any:
    """Return a module class that applies `length` copies of `block` one after another.

    `block.__call__(x, layered, shared)` returns (x, None). `layered` is a tree of arrays with the layers first,
    sliced for each; `shared` is given whole to all. The collections "params", "cache" and "taps" are stacked.
    With `shared=True` there is one copy of the parameters, unstacked, applied `length` times (Lan et al. 2020).
    """
    body: Any = block
    if remat != "none":
        # scan keeps the recomputation apart from the forward pass by itself: prevent_cse would only cost time
        body = nn.remat(block, policy=POLICIES[remat], prevent_cse=False)
    stacked = {"cache": 0, "taps": 0} if shared else {"params": 0, "cache": 0, "taps": 0}
    return nn.scan(
        body,
        variable_axes=stacked,
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
