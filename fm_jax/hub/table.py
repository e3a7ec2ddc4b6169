"""Two-way name tables: our path <-> their name, read in both directions.

Our layers are stacked, [L, …], theirs are tensors of their own: "{}" in a name stands for the layer. A leaf is filled
layer by layer straight into its shards, so that neither a device nor a host ever holds more than its share and one of
the file's tensors.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import Params
from fm_jax.hub.files import fill
from fm_jax.hub.files.weights import Index, Spec, Weights

_SHOWN = 10


@dataclass(frozen=True)
class Entry:
    """One of our leaves and where its numbers stand."""

    path: str  # ours; a leaf [L, …] where `name` holds "{}"
    name: str  # theirs
    axes: tuple[int, ...] = ()  # of their tensor in our order; () leaves them as they are
    part: int = 0  # which of the `parts` equal parts along our last axis this leaf is (a fused projection)
    parts: int = 1
    singles: int = 0  # axes of size 1 that their tensor has before all others

    @property
    def stacked(self) -> bool:
        """Say whether the leaf has the layers first."""
        return "{}" in self.name

    @property
    def fused(self) -> int:
        """Return the axis of theirs along which parts lie side by side."""
        return self.axes[-1] + self.singles if self.axes else -1


class Blank(NamedTuple):
    """A tensor that the other library wants beside one of ours, though it changes no number: written as zeros."""

    beside: str  # the name of a tensor that is written
    name: str
    spec: Spec  # dtype "": that of the tensor beside it


@dataclass(frozen=True)
class Table:
    """All names of one model.

    Attributes:
        entries: may list more than a configuration has (a bias, a head): leaves that the model lacks are passed over.
        rename: (regular expression, replacement) for whole names in older files, the first that matches is applied.
        skip: regular expressions of stored tensors that are no parameters, such as masks and position ids.
        tied: stored copy -> the name it must equal; a copy is left out when written.
        blank: tensors that `blanks` gives for a file; reading wants their names in `skip`.
    """

    entries: tuple[Entry, ...]
    rename: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    blank: tuple[Blank, ...] = ()

    def current(self, name: str) -> str:
        """Return the name that the table knows for one that an older file may have."""
        return next((re.sub(old, new, name) for old, new in self.rename if re.fullmatch(old, name)), name)

    def under(self, prefix: str, *more: Entry, **changes: Any) -> "Table":
        """Return the table of a model that holds this one below `prefix`, with further entries of its own."""
        moved = tuple(replace(entry, path=f"{prefix}/{entry.path}") for entry in self.entries)
        return replace(self, entries=moved + more, **changes)


def same(path: str, name: str) -> Entry:
    """Return the entry of a leaf that is stored as it is."""
    return Entry(path, name)


def flipped(path: str, name: str) -> Entry:
    """Return the entry of a matrix [in, out] that torch's Linear stores as [out, in]."""
    return Entry(path, name, axes=(1, 0))


def linear(path: str, name: str) -> tuple[Entry, Entry]:
    """Return kernel and bias of a torch Linear."""
    return flipped(f"{path}/kernel", f"{name}.weight"), same(f"{path}/bias", f"{name}.bias")


def norm(path: str, name: str) -> tuple[Entry, Entry]:
    """Return scale and bias of a normalisation."""
    return same(f"{path}/scale", f"{name}.weight"), same(f"{path}/bias", f"{name}.bias")


def read(table: Table, wanted: Params, weights: Weights) -> Params:
    """Return the model's parameters, each in the sharding and dtype of `wanted`.

    Args:
        table: of the model.
        wanted: `jax.ShapeDtypeStruct` of every leaf, with a sharding or without (then: the first local device).
        weights: what was stored.

    Raises:
        CheckpointError: names that are missing, left over, matched twice, or of another shape, all in one message.
    """
    leaves = tree.flatten(wanted)
    stored = _match(table, leaves, weights)
    by_path = {entry.path: entry for entry in table.entries if entry.path in leaves}
    return tree.unflatten(
        {
            path: fill.fill(
                partial(_piece, entry := by_path[path], weights, stored),
                leaf,
                path=path,
                stacked=entry.stacked,
                axis=entry.axes.index(0) if entry.axes else 0,
            )
            for path, leaf in leaves.items()
        }
    )


def write(table: Table, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (their name, array) for every stored tensor, one at a time and in the order of the table.

    Raises:
        CheckpointError: a leaf that the table has no name for.
    """
    leaves = tree.flatten(params)
    named = {entry.path for entry in table.entries}
    if nameless := [path for path in leaves if path not in named]:
        raise CheckpointError(f"no stored name for {_some(nameless)}: the other library's model has no such parameter")
    groups: dict[str, list[Entry]] = {}
    for entry in table.entries:
        if entry.path in leaves:
            groups.setdefault(entry.name, []).append(entry)
    for name, entries in groups.items():
        entries.sort(key=lambda entry: entry.part)
        for layer in range(leaves[entries[0].path].shape[0] if entries[0].stacked else 1):
            pieces = [_theirs(entry, leaves[entry.path], layer) for entry in entries]
            whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=entries[0].fused)
            yield name.replace("{}", str(layer)), np.ascontiguousarray(whole)


def specs(table: Table, params: Params) -> dict[str, Spec]:
    """Return what `write` will yield, for arrays or abstract arrays, without touching a number."""
    leaves, found = tree.flatten(params), dict[str, Spec]()
    for entry in table.entries:
        if entry.path in leaves:
            leaf = leaves[entry.path]
            shape = _their_shape(entry, leaf.shape[1:] if entry.stacked else leaf.shape)
            for layer in range(leaf.shape[0] if entry.stacked else 1):
                found[entry.name.replace("{}", str(layer))] = Spec(np.dtype(leaf.dtype).name, shape)
    return found


def blanks(table: Table, written: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return the tensors of zeros that complete what is written."""
    return {
        blank.name: blank.spec._replace(dtype=blank.spec.dtype or written[blank.beside].dtype)
        for blank in table.blank
        if blank.beside in written
    }


def _match(table: Table, leaves: Mapping[str, Any], weights: Weights) -> dict[str, str]:
    """Return {their name as the table has it: the name in the file}, or raise with all that does not fit."""
    problems: list[str] = []
    origin: dict[str, str] = {}
    for name in weights.specs:
        if any(re.fullmatch(pattern, name) for pattern in table.skip):
            continue
        new = table.current(name)
        if new in origin:
            problems.append(f"{new}: stored twice, as {origin[new]} and as {name}")
        origin.setdefault(new, name)
    copies = _copies(table, origin, weights, problems)
    uses: dict[str, list[Entry]] = {}
    missing = set(leaves)
    for entry in table.entries:
        if entry.path not in leaves:
            continue
        if entry.path not in missing:
            problems.append(f"{entry.path}: the table names it twice")
        missing.discard(entry.path)
        leaf = leaves[entry.path]
        shape = _their_shape(entry, leaf.shape[1:] if entry.stacked else leaf.shape)
        for layer in range(leaf.shape[0] if entry.stacked else 1):
            name = entry.name.replace("{}", str(layer))
            uses.setdefault(name, []).append(entry)
            if name not in origin:
                problems.append(f"{name} (for {entry.path}): not stored")
            elif (found := weights.specs[origin[name]]).shape != shape:
                problems.append(f"{name}: stored as {list(found.shape)}, the config wants {list(shape)}")
            elif jnp.issubdtype(found.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
                problems.append(f"{name}: stored as {found.dtype}, which is no {np.dtype(leaf.dtype).name}")
    problems += [f"{path}: the table has no name for it" for path in sorted(missing)]
    for name, entries in uses.items():
        if sorted(entry.part for entry in entries) != list(range(entries[0].parts)):
            problems.append(f"{name}: read for {', '.join(entry.path for entry in entries)}")
    known = {*uses, *copies}
    problems += [f"{name}: stored, but the model has no place for it" for name in origin if name not in known]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"{weights.where} does not fit the model, {count}: {_some(list(dict.fromkeys(problems)))}"
        )
    return origin


def _copies(table: Table, origin: Mapping[str, str], weights: Weights, problems: list[str]) -> set[str]:
    """Return the names of stored copies of other tensors; one that differs from its original is a problem."""
    found = set()
    for copy, original in table.tied:
        if copy not in origin or original not in origin:
            continue
        found.add(copy)
        shapes = [weights.specs[origin[name]].shape for name in (copy, original)]
        if shapes[0] != shapes[1] or not all(
            np.array_equal(weights.read(origin[copy], rows), weights.read(origin[original], rows))
            for rows in _rows(shapes[0])
        ):
            problems.append(f"{copy} differs from {original}, to which the config ties it")
    return found


def _rows(shape: tuple[int, ...]) -> Iterator[Index]:
    """Yield the indices of a tensor's blocks of rows, of four million numbers or one row each."""
    rest = tuple(slice(0, size) for size in shape[1:])
    if not shape:
        yield ()
        return
    height = max(1, (1 << 22) // max(1, math.prod(shape[1:])))
    for top in range(0, shape[0], height):
        yield (slice(top, min(top + height, shape[0])), *rest)


def _their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stored shape of one layer of a leaf."""
    theirs = list(shape)
    for ours, axis in enumerate(entry.axes):
        theirs[axis] = shape[ours]
    theirs = [1] * entry.singles + theirs
    if entry.parts > 1:
        theirs[entry.fused] *= entry.parts
    return tuple(theirs)


def _piece(
    entry: Entry,
    weights: Weights,
    stored: Mapping[str, str],
    shape: tuple[int, ...],
    layer: int,
    index: Index,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read a part of one layer of a leaf: `shape` is the layer's, `index` the slices of it; in `out` if it can."""
    cuts = [slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
    axes = entry.axes or tuple(range(len(shape)))
    theirs = [slice(None)] * len(shape)
    for ours, axis in enumerate(axes):
        theirs[axis] = cuts[ours]
    theirs = [slice(0, 1)] * entry.singles + theirs
    if entry.parts > 1:
        start, last = entry.part * shape[-1], theirs[entry.fused]
        theirs[entry.fused] = slice(last.start + start, last.stop + start)
    name = stored[entry.name.replace("{}", str(layer))]
    as_it_is = axes == tuple(range(len(shape))) and not entry.singles
    if out is not None and as_it_is and weights.specs[name].dtype == out.dtype.name:
        return weights.read(name, tuple(theirs), out)
    found = weights.read(name, tuple(theirs))
    return found.reshape(found.shape[entry.singles :]).transpose(axes)


def _theirs(entry: Entry, leaf: Any, layer: int) -> np.ndarray:
    """Return one layer of a leaf as they store it, or their part of it."""
    piece = np.asarray(jax.device_get(leaf[layer] if entry.stacked else leaf))
    piece = piece.transpose(np.argsort(entry.axes)) if entry.axes else piece
    return piece.reshape((1,) * entry.singles + piece.shape)


def _some(problems: list[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
