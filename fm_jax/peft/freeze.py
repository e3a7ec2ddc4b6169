"""Freeze part of a model: the optimiser gets only the trained leaves.

A linear probe is `by_pattern(params, ("head/.*",))`.
"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.optim import depth


def by_pattern(params: Params, patterns: Iterable[str]) -> tuple[Params, Params]:
    """Split into (trained, frozen); leaves whose whole path matches a regular expression are trained.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    return tree.partition(params, patterns)


def below(params: Params, layer: int, stacked: str = "blocks") -> tuple[Params, Params]:
    """Split into (trained, frozen); the embeddings and the first `layer` layers of a stack are frozen.

    A stacked leaf [L, ...] is split in two, [layer:] trained and [:layer] frozen. At `layer` 0 only the embeddings are
    frozen, at L the whole stack. A token table tied to the head is frozen with the embeddings. This saves the frozen
    layers' optimiser state and update; the backward pass of a scanned stack still runs through them.

    Args:
        params: the model's parameters; may hold tracers.
        layer: index of the lowest trained layer, 0 to L.
        stacked: path of the node with stacked layers, such as "encoder/blocks".

    Raises:
        ConfigError: there is no such stack, its leaves differ in L, or `layer` is outside it.
    """
    flat = tree.flatten(params)
    cut = {path for path in flat if path.startswith(f"{stacked}/")}
    heights = {depth.layers(path, flat[path]) for path in cut}
    if len(heights) != 1 or 0 in heights:
        raise ConfigError(f"no layers are stacked under {stacked!r}; the parameters are {', '.join(list(flat)[:8])}, …")
    height = heights.pop()
    if not 0 <= layer <= height:
        raise ConfigError(f"the lowest trained layer must be between 0 and {height} for {stacked!r}, not {layer}")
    trained: Params = {}
    frozen: Params = {}
    for path, leaf in flat.items():
        if path not in cut:
            (frozen if re.fullmatch(depth.EMBEDDINGS, path) else trained)[path] = leaf
            continue
        if layer < height:
            trained[path] = jax.lax.slice_in_dim(leaf, layer, height)
        if layer > 0:
            frozen[path] = jax.lax.slice_in_dim(leaf, 0, layer)
    return tree.unflatten(trained), tree.unflatten(frozen)


def combine(trained: Params, frozen: Params) -> Params:
    """Join the trees of `by_pattern` or `below` to the model's parameters.

    A leaf in one tree is passed through uncopied; a stacked leaf in both is concatenated, frozen layers first.

    Raises:
        ValueError: both trees contain a leaf that is not stacked.
    """
    top, bottom = tree.flatten(trained), tree.flatten(frozen)
    both = top.keys() & bottom.keys()
    if whole := sorted(path for path in both if not depth.layers(path, top[path])):
        raise ValueError(f"both the trained and the frozen tree contain {whole[:5]}, which are not stacked by layer")
    joined = {path: jnp.concatenate([bottom[path], top[path]]) for path in both}
    return tree.unflatten(top | bottom | joined)
