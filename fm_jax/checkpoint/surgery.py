"""Put loaded weights into another tree, and account for every name on both sides."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checkpoint import leaves
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import Params

Reshape = Callable[[Any, jax.ShapeDtypeStruct], Any]
"""(source leaf, wanted shape and dtype) -> array of that shape and dtype."""

_SHOWN = 10


def load(
    target: Params,
    source: Params,
    *,
    rename: Iterable[tuple[str, str]] = (),
    fresh: Iterable[str] = (),
    unused: Iterable[str] = (),
    reshape: Mapping[str, Reshape] | None = None,
) -> Params:
    r"""Return `target` with the leaves of `source`, each in the sharding of the leaf it replaces.

    Every leaf of both trees must be matched by name or excused. Patterns are regular expressions over whole paths
    ("blocks/mlp/up/kernel"), and one that does nothing is an error, for it is nearly always misspelt.

    Args:
        target: fresh parameters, or ShapeDtypeStructs where no leaf stays fresh.
        source: loaded parameters. Leaves that already lie where they should are shared, not copied.
        rename: (pattern over source paths, replacement with groups like \1); the first that matches is applied.
        fresh: target paths that keep the target's value, whatever the source holds.
        unused: source paths to leave out.
        reshape: pattern over target paths -> function that makes the loaded leaf fit, e.g. `interpolate`.

    Raises:
        CheckpointError: with all that does not fit, the first ten in words.
    """
    wanted, given, problems = tree.flatten(target), tree.flatten(source), list[str]()
    left_out = _excused("unused", unused, given, problems)
    kept = _excused("fresh", fresh, wanted, problems)
    origin = _origins([path for path in given if path not in left_out], rename, problems)
    matched = {path: given[origin[path]] for path in wanted if path in origin and path not in kept}
    problems += _unmatched(wanted, origin, kept)
    problems += [
        f"{path}: is fresh, but the target has no value for it; give initialised parameters"
        for path in sorted(kept)
        if isinstance(wanted[path], jax.ShapeDtypeStruct)
    ]
    matched = _reshaped(matched, wanted, reshape or {}, problems)
    for path, leaf in matched.items():
        have, want = leaves.signature(leaf), leaves.signature(wanted[path])
        if have != want:
            was = f" (source {origin[path]})" if origin[path] != path else ""
            problems.append(f"{path}: source has {leaves.show(have)}, target {leaves.show(want)}{was}")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(f"weights do not fit, {count}: {leaves.listing(problems, _SHOWN)}")
    return tree.unflatten({path: _place(matched[path], w) if path in matched else w for path, w in wanted.items()})


def cast(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Convert a leaf to the wanted dtype; a `reshape` for weights stored in another precision."""
    return jnp.asarray(leaf).astype(wanted.dtype)


def interpolate(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Stretch or shrink the first axis linearly; a `reshape` for a table of positions [P, D]."""
    return jax.image.resize(jnp.asarray(leaf), wanted.shape, "linear", antialias=False)


def _excused(kind: str, patterns: Iterable[str], paths: Iterable[str], problems: list[str]) -> set[str]:
    """Return the paths that a pattern matches whole; a pattern that matches none is a problem."""
    excused: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = {path for path in paths if _match(pattern, path, kind)}
        if not found:
            problems.append(f"{kind} pattern {pattern!r} matches no {'source' if kind == 'unused' else 'target'} leaf")
        excused |= found
    return excused


def _origins(paths: list[str], rename: Iterable[tuple[str, str]], problems: list[str]) -> dict[str, str]:
    """Return {new name: source path}; two sources of one name and rules that rename nothing are problems."""
    rules, applied, origin = list(rename), set[str](), dict[str, str]()
    for path in paths:
        name = path
        for pattern, replacement in rules:
            if found := _match(pattern, path, "rename"):
                try:
                    name = found.expand(replacement)
                except (re.error, IndexError) as error:
                    raise CheckpointError(f"rename replacement {replacement!r} for {path}: {error}") from error
                applied.add(pattern)
                break
        if name in origin:
            problems.append(f"{name}: comes from both {origin[name]} and {path}")
        else:
            origin[name] = path
    idle = [pattern for pattern, _ in rules if pattern not in applied]
    problems += [f"rename pattern {pattern!r} is applied to no source leaf" for pattern in idle]
    return origin


def _unmatched(wanted: Mapping[str, Any], origin: Mapping[str, str], kept: set[str]) -> list[str]:
    missing = [path for path in wanted if path not in origin and path not in kept]
    spare = [name for name in origin if name not in wanted or name in kept]
    problems = []
    for i, path in enumerate(missing):
        hint = _nearest(path, spare) if i < _SHOWN else ""
        problems.append(f"{path}: not in the source{hint}; rename, or call it fresh")
    for i, name in enumerate(spare):
        if name in kept:
            problems.append(f"{origin[name]}: is in the source, but {name} stays fresh; call it unused")
            continue
        hint = _nearest(name, missing) if i < _SHOWN else ""
        problems.append(f"{origin[name]}: in the source, not in the target{hint}; rename, or call it unused")
    return problems


def _reshaped(
    matched: dict[str, Any], wanted: Mapping[str, Any], reshape: Mapping[str, Reshape], problems: list[str]
) -> dict[str, Any]:
    """Return the loaded leaves, those that a pattern matches put through its function (the first, if several)."""
    done: dict[str, Any] = {}
    for pattern, function in reshape.items():
        found = [path for path in matched if path not in done and _match(pattern, path, "reshape")]
        if not found:
            problems.append(f"reshape pattern {pattern!r} matches no loaded leaf")
        for path in found:
            shape = jax.ShapeDtypeStruct(wanted[path].shape, wanted[path].dtype)
            try:
                done[path] = function(matched[path], shape)
            except Exception as error:
                done[path] = matched[path]
                problems.append(f"{path}: reshape failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return {path: done.get(path, leaf) for path, leaf in matched.items()}


def _match(pattern: str, path: str, kind: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, path)
    except re.error as error:
        raise CheckpointError(f"{kind} pattern {pattern!r} is not a regular expression: {error}") from error


def _nearest(path: str, candidates: list[str]) -> str:
    """Return a hint: the candidate most like `path`, or nothing."""
    near = difflib.get_close_matches(path, candidates, n=1, cutoff=0.6)
    return f"; nearest unmatched is {near[0]}" if near else ""


def _place(leaf: Any, like: Any) -> Any:
    """Return the leaf as a jax array that lies as `like` does."""
    where = getattr(like, "sharding", None)
    if where is None or (isinstance(like, jax.Array) and not like.committed):
        return jnp.asarray(leaf)
    if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    whole = np.asarray(leaf)  # every process holds all of it and gives its own devices their parts
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])
