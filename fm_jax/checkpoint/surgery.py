"""Copy loaded weights into another tree, accounting for every leaf of both."""

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

    Every leaf of both trees must be matched by name or listed in `fresh` or `unused`. Patterns are regular expressions
    over whole paths ("blocks/mlp/up/kernel"); one without effect is an error because it is nearly always misspelt.

    Args:
        target: initialised parameters, or ShapeDtypeStructs if no leaf stays fresh.
        source: loaded parameters. Leaves that already have the right sharding are shared, not copied. Shapes stand in
            for them while `target` is traced, so that a resumed run reads no pretrained weights.
        rename: (pattern over source paths, replacement with groups like \1); the first that matches is applied.
        fresh: patterns of target paths that keep the target's value.
        unused: patterns of source paths to ignore.
        reshape: pattern over target paths -> function that adapts the loaded leaf, e.g. `interpolate`.

    Raises:
        CheckpointError: leaves that do not match; the message lists the first ten. Or shapes for weights that are
            not traced.
    """
    wanted, problems = tree.flatten(target), list[str]()
    given = _stood_in(tree.flatten(source), wanted)
    left_out = _excused("unused", unused, given, problems)
    kept = _excused("fresh", fresh, wanted, problems)
    origin = _origins([path for path in given if path not in left_out], rename, problems)
    matched = {path: given[origin[path]] for path in wanted if path in origin and path not in kept}
    problems += _unmatched(wanted, origin, kept)
    problems += [
        f"{path}: is fresh, but the target has no value for it; pass initialised parameters"
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
        raise CheckpointError(f"weights do not match, {count}: {leaves.listing(problems, _SHOWN)}")
    return tree.unflatten({path: _place(matched[path], w) if path in matched else w for path, w in wanted.items()})


def cast(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Convert a leaf to the wanted dtype, any shape; a `reshape` for weights stored in another precision."""
    return jnp.asarray(leaf).astype(wanted.dtype)


def interpolate(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Interpolate the first axis linearly: [P, D] -> [P', D]; a `reshape` for a position table."""
    return jax.image.resize(jnp.asarray(leaf), wanted.shape, "linear", antialias=False)


def _excused(kind: str, patterns: Iterable[str], paths: Iterable[str], problems: list[str]) -> set[str]:
    """Return the paths that a pattern matches in full; a pattern without matches is a problem."""
    excused: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matches = {path for path in paths if _match(pattern, path, kind)}
        if not matches:
            problems.append(f"{kind} pattern {pattern!r} matches no {'source' if kind == 'unused' else 'target'} leaf")
        excused |= matches
    return excused


def _origins(paths: list[str], rename: Iterable[tuple[str, str]], problems: list[str]) -> dict[str, str]:
    """Return {new name: source path}; two sources with one new name and rules without effect are problems."""
    rules, applied, origin = list(rename), set[str](), dict[str, str]()
    for path in paths:
        name = path
        for pattern, replacement in rules:
            if match := _match(pattern, path, "rename"):
                try:
                    name = match.expand(replacement)
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


def _stood_in(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source with zeros for shapes, which is right only while shapes alone are asked for."""
    shapes = [path for path, leaf in given.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if shapes and not any(isinstance(leaf, jax.core.Tracer) for leaf in wanted.values()):
        raise CheckpointError(f"weights were not read, only their shapes: {leaves.listing(shapes, _SHOWN)}")
    return {**given, **{path: jnp.zeros(given[path].shape, given[path].dtype) for path in shapes}}


def _unmatched(wanted: Mapping[str, Any], origin: Mapping[str, str], kept: set[str]) -> list[str]:
    missing = [path for path in wanted if path not in origin and path not in kept]
    spare = [name for name in origin if name not in wanted or name in kept]
    problems = []
    for i, path in enumerate(missing):
        hint = _nearest(path, spare) if i < _SHOWN else ""
        problems.append(f"{path}: not in the source{hint}; add a rename, or list it in fresh")
    for i, name in enumerate(spare):
        if name in kept:
            problems.append(f"{origin[name]}: is in the source, but {name} stays fresh; list it in unused")
            continue
        hint = _nearest(name, missing) if i < _SHOWN else ""
        problems.append(f"{origin[name]}: in the source, not in the target{hint}; add a rename, or list it in unused")
    return problems


def _reshaped(
    matched: dict[str, Any], wanted: Mapping[str, Any], reshape: Mapping[str, Reshape], problems: list[str]
) -> dict[str, Any]:
    """Apply to each loaded leaf the function of the first pattern that matches its path, if any."""
    done: dict[str, Any] = {}
    for pattern, function in reshape.items():
        paths = [path for path in matched if path not in done and _match(pattern, path, "reshape")]
        if not paths:
            problems.append(f"reshape pattern {pattern!r} matches no loaded leaf")
        for path in paths:
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
    """Return a hint with the candidate nearest to `path`, or ""."""
    near = difflib.get_close_matches(path, candidates, n=1, cutoff=0.6)
    return f"; nearest unmatched is {near[0]}" if near else ""


def _place(leaf: Any, like: Any) -> Any:
    """Return the leaf as a JAX array with the sharding of `like`."""
    where = getattr(like, "sharding", None)
    if where is None or (isinstance(like, jax.Array) and not like.committed):
        return jnp.asarray(leaf)
    if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    whole = np.asarray(leaf)  # every process holds the whole array and fills its own devices' parts
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])
