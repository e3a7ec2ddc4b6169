"""Nested dicts as flat ones: paths like "blocks/attn/q/kernel"."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from flax import traverse_util

from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params


def flatten(tree: Params) -> dict[str, Any]:
    """Return {"a/b/c": leaf} in sorted order."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: dict[str, Any]) -> Params:
    """Return the nested dict that `flatten` came from."""
    return traverse_util.unflatten_dict(flat, sep="/")


def select(tree: Params, patterns: Iterable[str]) -> set[str]:
    """Return the paths that a pattern (a regular expression over the whole path) matches.

    Raises:
        ConfigError: a pattern matches nothing, which is nearly always a misspelt name.
    """
    paths = list(flatten(tree))
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {path for path in paths if re.fullmatch(pattern, path)}
        if not matches:
            raise ConfigError(f"pattern {pattern!r} matches no parameter; known are {', '.join(paths[:8])}, …")
        chosen |= matches
    return chosen


def partition(tree: Params, patterns: Iterable[str]) -> tuple[Params, Params]:
    """Split a tree into (leaves that a pattern matches, the rest); each keeps its place in the nesting."""
    chosen = select(tree, patterns)
    flat = flatten(tree)
    inside = {path: leaf for path, leaf in flat.items() if path in chosen}
    outside = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(inside), unflatten(outside)


def merge(first: Params, second: Params) -> Params:
    """Merge two trees without common leaves: the inverse of `partition`."""
    flat, more = flatten(first), flatten(second)
    if shared := flat.keys() & more.keys():
        raise ValueError(f"both trees contain {sorted(shared)[:5]}")
    return unflatten(flat | more)


def map_with_path(function: Callable[[str, Any], Any], tree: Params) -> Params:
    """Apply `function(path, leaf)` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def count(tree: Params) -> int:
    """Return the number of scalars in a tree of arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())
