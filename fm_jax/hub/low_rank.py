"""Convert the A and B of LoRA adapters between peft and fm_jax: names, fused matrices, ranks and scales.

Theirs: A [rank, in] and B [out, rank], a tensor a layer, one pair for a fused projection. Ours: A [L, in, rank] and
B [L, rank, out], a leaf for all layers, one pair for each part. `hub/adapter.py` describes the differences.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, shown
from fm_jax.core.types import Params
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Weights
from fm_jax.hub.table import Entry, Table

# ignored: the tensors show which matrices have adapters; the others are training settings of peft and of tools that
# write its folders, or are refused elsewhere
_PASSED = """
    auto_mapping corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform lora_dropout lora_dtype lora_ga_config lorap_emb_lr lorap_lr_ratio
    megatron_config megatron_core merge_weights modules_to_save peft_version qalora_group_size revision
    runtime_config target_modules task_type unsloth_version
"""
_OTHER_KINDS = """
    additional_trainable_parameters alora_invocation_tokens arrow_config enable_lora kasa_config layer_replication
    lora_bias monteclora_config target_parameters trainable_token_indices use_bdlora use_dora use_merged_linear
    use_qa_lora use_qalora velora_config
"""
_LONGEST, _REPEATS = 200, 4  # of a pattern: characters, and parts that may repeat
Pair = tuple[np.ndarray, np.ndarray]  # A [in, rank], B [rank, out]


class Place(NamedTuple):
    """Our leaf, or one layer of it, that corresponds to (a part of) one of their matrices."""

    entry: Entry
    layer: int
    shape: tuple[int, int]  # in, out


@dataclass(frozen=True)
class Sizes:
    """Ranks and scales of an adapter_config.json."""

    rank: int
    alpha: float
    root: bool  # scale by alpha / sqrt(rank), as in rsLoRA
    ranks: Mapping[str, Any]  # regular expression for a name, or for its end after a dot -> rank
    alphas: Mapping[str, Any]

    @classmethod
    def read(cls, fields: Fields) -> "Sizes":
        """Read every field except the base model's name."""
        if (kind := fields.take("peft_type", str, "LORA")) != "LORA":
            raise CheckpointError(f"{fields.where}: peft_type {shown(kind)} is not supported, only LORA is")
        fields.expect("bias", "none")
        fields.expect("loftq_config", {})
        # the others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) also change the base model's weights
        fields.expect("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")
        for name in _OTHER_KINDS.split():
            fields.expect(name, False, [], {})
        fields.skip(*_PASSED.split())
        rank, alpha = fields.take("r", int), fields.take("lora_alpha", float)
        patterns = [fields.take(f"{word}_pattern", dict, {}) for word in ("rank", "alpha")]
        for name, value in (pair for pattern in patterns for pair in pattern.items()):
            if problem := _unsound(name):
                fields.refuse(f"the pattern {shown(name)} {problem}")
            if type(value) not in (int, float) or not 0 < value < 1 << 64:
                fields.refuse(f"the pattern {shown(name)} has the value {shown(value)}, which must be a number above 0")
        if rank < 1 or not 0 < alpha < float("inf"):
            fields.refuse(f"r {rank} and lora_alpha {alpha}: both must be above 0")
        return cls(rank, alpha, fields.take("use_rslora", bool, False), *patterns)

    @property
    def scale(self) -> float:
        """Return the factor of A B for matrices that no pattern matches."""
        return self.alpha / (self.rank**0.5 if self.root else self.rank)

    def of(self, name: str) -> tuple[int, float]:
        """Return rank and scale of a matrix by its name; the first pattern that matches counts."""
        rank, alpha = (
            next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
            for pattern, default in ((self.ranks, self.rank), (self.alphas, self.alpha))
        )
        return int(rank), alpha / (rank**0.5 if self.root else rank)


def _unsound(pattern: str) -> str:
    """Return why a pattern cannot be used as a regular expression; matching some would never end."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    if len(pattern) > _LONGEST or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _REPEATS:
        return f"is not supported: it repeats a group or more than {_REPEATS} parts, or is longer than {_LONGEST}"
    return ""


def names(entry: Entry, shape: Sequence[int]) -> list[str]:
    """Return the name of an entry's tensor in each layer of a leaf of this shape."""
    return [entry.name.replace("{}", str(layer)) for layer in range(shape[0] if entry.stacked else 1)]


def matrices(table: Table, leaves: Mapping[str, Any]) -> dict[str, list[Place]]:
    """Return {name of their matrix: our leaves in it, in column order} for every matrix that can have an adapter."""
    places: dict[str, list[Place]] = {}
    for entry in sorted(table.entries, key=lambda entry: entry.part):
        if entry.path in leaves and entry.path.endswith("kernel") and entry.name.endswith(".weight"):
            shape = leaves[entry.path].shape
            for layer, name in enumerate(names(entry, shape)):
                places.setdefault(name.removesuffix(".weight"), []).append(Place(entry, layer, shape[-2:]))
    return places


def ours(
    pairs: Mapping[str, Mapping[str, str]], sizes: Sizes, weights: Weights, places: Mapping[str, Sequence[Place]]
) -> dict[str, dict[int, Pair]]:
    """Read {our path: {layer: (A, B)}}; B is rescaled for the config's alpha / rank.

    Args:
        pairs: {name of their matrix: {"A" or "B": stored name}}.
        sizes: ranks and scales of the config.
        weights: the stored tensors.
        places: the model's matrices, from `matrices`.

    Raises:
        CheckpointError: matrices that the model lacks, or that have another shape.
    """
    fused: dict[str, dict[int, tuple[np.ndarray, dict[str, np.ndarray]]]] = {}
    problems: list[str] = []
    for module, pair in pairs.items():
        if module not in places:
            problems.append(f"{module}: the model has no such matrix")
            continue
        parts, (rank, scale) = places[module], sizes.of(module)
        rows, columns = parts[0].shape
        shapes = {part: weights.specs[stored].shape for part, stored in pair.items()}
        if shapes != (wanted := {"A": (rank, rows), "B": (columns * len(parts), rank)}):
            problems.append(f"{module}: A {shapes['A']}, B {shapes['B']}, not A {wanted['A']}, B {wanted['B']}")
            continue
        everything = {part: tuple(slice(0, size) for size in shape) for part, shape in shapes.items()}
        a, b = (weights.read(pair[part], everything[part]).astype(np.float32).T for part in "AB")
        b = b if scale == sizes.scale else b * np.float32(scale / sizes.scale)
        cuts = np.split(b, len(parts), axis=1)
        layers = fused.setdefault(parts[0].entry.name, {})
        layers[parts[0].layer] = a, {place.entry.path: cut for place, cut in zip(parts, cuts, strict=True)}
    if problems:
        raise CheckpointError(f"{weights.where} does not fit the model: {'; '.join(problems[:10])}")
    return {path: layers for matrix in fused.values() for path, layers in _split(matrix, sizes.rank).items()}


def _split(matrix: Mapping[int, tuple[np.ndarray, dict[str, np.ndarray]]], rank: int) -> dict[str, dict[int, Pair]]:
    """Split one of their adapters, over all layers, into our leaves; parts that no layer changes get no adapter."""
    paths = list(next(iter(matrix.values()))[1])
    moved = [path for path in paths if any(parts[path].any() for _, parts in matrix.values())] or paths

    def blocks(a: np.ndarray, parts: Mapping[str, np.ndarray]) -> bool:
        """Say whether B is block-diagonal: each part reads only its own columns of A."""
        others = (np.delete(parts[path], np.s_[i * rank : (i + 1) * rank], axis=0) for i, path in enumerate(moved))
        return a.shape[1] == rank * len(moved) and not any(rows.any() for rows in others)

    diagonal = len(moved) > 1 and all(blocks(a, parts) for a, parts in matrix.values())
    rows = [slice(i * rank, (i + 1) * rank) if diagonal else slice(None) for i in range(len(moved))]
    return {
        path: {layer: (a[:, cut], parts[path][cut]) for layer, (a, parts) in matrix.items()}
        for path, cut in zip(moved, rows, strict=True)
    }


def stacked(layers: Mapping[int, Pair], shape: Sequence[int], rank: int) -> dict[str, Any]:
    """Return a leaf's A [(L,) in, rank] and B [(L,) rank, out]; layers without an adapter are zeros."""
    *stack, rows, columns = shape
    a, b = np.zeros((*stack, rows, rank), np.float32), np.zeros((*stack, rank, columns), np.float32)
    for layer, (down, up) in layers.items():
        index = (layer,) if stack else ()
        a[(*index, slice(None), slice(down.shape[1]))] = down
        b[(*index, slice(up.shape[0]))] = up
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def theirs(adapters: Params, places: Mapping[str, Sequence[Place]]) -> Iterator[tuple[str, Pair]]:
    """Yield (name of their matrix, (A, B)) for every matrix that has an adapter, layer by layer.

    Raises:
        CheckpointError: an adapter of a leaf that is not a matrix, or of another shape.
    """
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in tree.flatten(adapters).items()}
    adapted = {path.rpartition("/")[0] for path in flat}
    if odd := sorted(adapted - {place.entry.path for parts in places.values() for place in parts}):
        raise CheckpointError(
            f"{', '.join(odd)} has an adapter, but peft supports LoRA only on matrices of linear layers"
        )
    for module, parts in places.items():
        pairs = {
            place.entry.part: _layer(place, flat.get(f"{path}/a"), flat.get(f"{path}/b"))
            for place in parts
            if (path := place.entry.path) in adapted
        }
        if pairs:
            yield module, _joined(pairs, len(parts), _shared(parts, adapted, flat))


def _layer(place: Place, a: np.ndarray | None, b: np.ndarray | None) -> Pair:
    """Return A and B of one layer of a leaf's adapter."""
    rows, columns = place.shape
    if a is not None and b is not None and a.ndim == b.ndim == (3 if place.entry.stacked else 2):
        down, up = (a[place.layer], b[place.layer]) if place.entry.stacked else (a, b)
        if (down.shape, up.shape) == ((rows, len(up)), (len(up), columns)):
            return down, up
    raise CheckpointError(f"{place.entry.path} is {rows} x {columns}, but its adapter has another shape")


def _shared(parts: Sequence[Place], adapted: set[str], flat: Mapping[str, np.ndarray]) -> bool:
    """Say whether the parts of a fused matrix have the same A in all layers."""
    downs = [flat[f"{place.entry.path}/a"] for place in parts if place.entry.path in adapted]
    return all(np.array_equal(downs[0], other) for other in downs[1:])


def _joined(pairs: Mapping[int, Pair], parts: int, shared: bool) -> Pair:
    """Return the pair of a matrix from the pairs of its parts."""
    downs, ups = [a for a, _ in pairs.values()], [b for _, b in pairs.values()]
    columns, start = ups[0].shape[1], 0
    up = np.zeros((len(ups[0]) if shared else sum(map(len, ups)), columns * parts), np.float32)
    for part, (_, b) in pairs.items():
        up[start : start + len(b), part * columns : (part + 1) * columns] = b
        start += 0 if shared else len(b)
    return downs[0] if shared else np.concatenate(downs, axis=1), up
