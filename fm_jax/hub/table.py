"""Two-way name tables: our parameter path <-> the name in a transformers checkpoint, for reading and writing.

Our layers are stacked, [L, …]; theirs are separate tensors: "{}" in a name stands for the layer. A leaf is filled
layer by layer straight into its shards, so that neither a device nor a host ever holds more than its share and one of
the file's tensors. In this folder "ours" means fm_jax, "theirs" the other library.
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
    """One of our leaves and the tensor that holds its values."""

    path: str  # ours; a leaf [L, …] if `name` holds "{}"
    name: str  # theirs
    axes: tuple[int, ...] = ()  # their axes in our order; () if the order is the same
    part: int = 0  # index of this leaf among the `parts` equal parts along our last axis (a fused projection)
    parts: int = 1
    singles: int = 0  # leading axes of size 1 of their tensor
    merged: bool = False  # their tensor is a matrix: all axes but the first, in their order, are one
    order: tuple[int, ...] = ()  # of each of our inputs (last axis but one), its place in theirs; () if it is the same

    @property
    def stacked(self) -> bool:
        """Say whether the first axis of the leaf is the layer."""
        return "{}" in self.name

    @property
    def fused(self) -> int:
        """Return the axis of their tensor along which the parts are concatenated."""
        return self.axes[-1] + self.singles if self.axes else -1


class Blank(NamedTuple):
    """A tensor that the other library requires although it has no effect on the outputs; it is written as zeros."""

    beside: str  # name of a tensor that is written
    name: str
    spec: Spec  # dtype "": the dtype of the tensor beside it


@dataclass(frozen=True)
class Table:
    """All names of one model.

    Attributes:
        entries: may list more than a configuration has (a bias, a head): leaves that the model lacks are ignored.
        rename: (regular expression, replacement) for whole names in older files; each that matches is applied, in turn.
        skip: regular expressions of stored tensors that are not parameters, such as masks and position ids.
        tied: (stored copy, name of the tensor it must equal); a copy is not written.
        blank: tensors that `blanks` adds to a file; to read the file, their names must be in `skip`.
    """

    entries: tuple[Entry, ...]
    rename: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    blank: tuple[Blank, ...] = ()

    def current(self, name: str) -> str:
        """Return the table's name for a name that may come from an older file, and lack its prefix."""
        for old, new in self.rename:
            name = re.sub(old, new, name) if re.fullmatch(old, name) else name
        return name

    def under(self, prefix: str, *more: Entry, **changes: Any) -> "Table":
        """Return the table of a model whose backbone, at `prefix`, has this table; `more` are its own entries."""
        moved = tuple(replace(entry, path=f"{prefix}/{entry.path}") for entry in self.entries)
        return replace(self, entries=moved + more, **changes)


def same(path: str, name: str) -> Entry:
    """Return the entry of a leaf that is stored with the same axes."""
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
        table: the model's names.
        wanted: `jax.ShapeDtypeStruct` of every leaf; one without a sharding is put on the first local device.
        weights: the stored tensors.

    Raises:
        CheckpointError: names that are missing, superfluous, matched twice, or of another shape, in one message.
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
        CheckpointError: a leaf without a name in the table.
    """
    leaves = tree.flatten(params)
    named = {entry.path for entry in table.entries}
    if nameless := [path for path in leaves if path not in named]:
        raise CheckpointError(f"no stored name for {_some(nameless)}: the model in transformers has no such parameter")
    groups: dict[str, list[Entry]] = {}
    for entry in table.entries:
        if entry.path in leaves:
            groups.setdefault(entry.name, []).append(entry)
    for name, entries in groups.items():
        entries.sort(key=lambda entry: entry.part)
        for layer in range(leaves[entries[0].path].shape[0] if entries[0].stacked else 1):
            pieces = [_theirs(entry, leaves[entry.path], layer) for entry in entries]
            whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=entries[0].fused)
            yield name.replace("{}", str(layer)), np.asarray(whole, order="C")  # keeps a single number one


def specs(table: Table, params: Params) -> dict[str, Spec]:
    """Return the name, dtype and shape of what `write` yields, without reading any value."""
    leaves, stored = tree.flatten(params), dict[str, Spec]()
    for entry in table.entries:
        if entry.path in leaves:
            leaf = leaves[entry.path]
            shape = _their_shape(entry, leaf.shape[1:] if entry.stacked else leaf.shape)
            for layer in range(leaf.shape[0] if entry.stacked else 1):
                stored[entry.name.replace("{}", str(layer))] = Spec(np.dtype(leaf.dtype).name, shape)
    return stored


def blanks(table: Table, written: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return the tensors of zeros to write beside the others."""
    return {
        blank.name: blank.spec._replace(dtype=blank.spec.dtype or written[blank.beside].dtype)
        for blank in table.blank
        if blank.beside in written
    }


def _match(table: Table, leaves: Mapping[str, Any], weights: Weights) -> dict[str, str]:
    """Return {name in the table: name in the file}, or raise one error for everything that does not fit."""
    problems: list[str] = []
    origin: dict[str, str] = {}
    for name in weights.specs:
        if any(re.fullmatch(pattern, name) for pattern in table.skip):
            continue
        new = table.current(name)
        if new in origin:
            problems.append(f"{new}: stored twice, as {origin[new]} and {name}")
        origin.setdefault(new, name)
    copies = _copies(table, origin, weights, problems)
    uses: dict[str, list[Entry]] = {}
    missing = set(leaves)
    for entry in table.entries:
        if entry.path not in leaves:
            continue
        if entry.path not in missing:
            problems.append(f"{entry.path}: it is in the name table twice")
        missing.discard(entry.path)
        leaf = leaves[entry.path]
        shape = _their_shape(entry, leaf.shape[1:] if entry.stacked else leaf.shape)
        for layer in range(leaf.shape[0] if entry.stacked else 1):
            name = entry.name.replace("{}", str(layer))
            uses.setdefault(name, []).append(entry)
            if name not in origin:
                problems.append(f"{name} (for {entry.path}): not stored")
            elif (spec := weights.specs[origin[name]]).shape != shape:
                problems.append(f"{name}: stored as {list(spec.shape)}, the config wants {list(shape)}")
            elif jnp.issubdtype(spec.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
                problems.append(f"{name}: stored as {spec.dtype}, which cannot be read as {np.dtype(leaf.dtype).name}")
    problems += [f"{path}: it is not in the name table" for path in sorted(missing)]
    for name, entries in uses.items():
        if sorted(entry.part for entry in entries) != list(range(entries[0].parts)):
            problems.append(f"{name}: read for {', '.join(entry.path for entry in entries)}")
    known = {*uses, *copies}
    problems += [f"{name}: stored, but the model has no such parameter" for name in origin if name not in known]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"{weights.where} does not fit the model, {count}: {_some(list(dict.fromkeys(problems)))}"
        )
    return origin


def _copies(table: Table, origin: Mapping[str, str], weights: Weights, problems: list[str]) -> set[str]:
    """Return the names of stored copies of other tensors; add a problem for a copy that differs."""
    copies = set()
    for copy, original in table.tied:
        if copy not in origin or original not in origin:
            continue
        copies.add(copy)
        shapes = [weights.specs[origin[name]].shape for name in (copy, original)]
        if shapes[0] != shapes[1] or not all(
            np.array_equal(weights.read(origin[copy], rows), weights.read(origin[original], rows))
            for rows in _rows(shapes[0])
        ):
            problems.append(f"{copy} differs from {original}, to which the config ties it")
    return copies


def _rows(shape: tuple[int, ...]) -> Iterator[Index]:
    """Yield the index of each block of rows of a tensor: at most four million numbers, or one row."""
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
    return (theirs[0], math.prod(theirs[1:])) if entry.merged else tuple(theirs)


def _piece(
    entry: Entry,
    weights: Weights,
    stored: Mapping[str, str],
    shape: tuple[int, ...],
    layer: int,
    index: Index,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read the slices `index` of one layer, of shape `shape`, of a leaf; into `out` where possible."""
    cuts = [slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
    axes = entry.axes or tuple(range(len(shape)))
    theirs = [slice(None)] * len(shape)
    for ours, axis in enumerate(axes):
        theirs[axis] = cuts[ours]
    theirs = [slice(0, 1)] * entry.singles + theirs
    if entry.parts > 1:
        start, last = entry.part * shape[-1], theirs[entry.fused]
        theirs[entry.fused] = slice(last.start + start, last.stop + start)
    rows = slice(None)
    if entry.order:  # read all inputs, and choose ours
        rows, theirs[axes[-2] + entry.singles] = cuts[-2], slice(None)
    name = stored[entry.name.replace("{}", str(layer))]
    if entry.merged:
        matrix = weights.read(name, (theirs[0], slice(0, weights.specs[name].shape[1])))
        whole = matrix.reshape(len(matrix), *(shape[axes.index(axis)] for axis in range(1, len(axes))))
        return whole[(slice(None), *theirs[1:])].transpose(axes)
    same_axes = axes == tuple(range(len(shape))) and not entry.singles and not entry.order
    if out is not None and same_axes and weights.specs[name].dtype == out.dtype.name:
        return weights.read(name, tuple(theirs), out)
    tensor = weights.read(name, tuple(theirs))
    tensor = tensor.reshape(tensor.shape[entry.singles :]).transpose(axes)
    return tensor[..., list(entry.order[rows]), :] if entry.order else tensor


def _theirs(entry: Entry, leaf: Any, layer: int) -> np.ndarray:
    """Return one layer of a leaf with the axes of their tensor, or of its part of a fused one."""
    piece = np.asarray(jax.device_get(leaf[layer] if entry.stacked else leaf))
    piece = piece[..., np.argsort(entry.order), :] if entry.order else piece
    piece = piece.transpose(np.argsort(entry.axes)) if entry.axes else piece
    return piece.reshape(len(piece), -1) if entry.merged else piece.reshape((1,) * entry.singles + piece.shape)


def _some(problems: list[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
