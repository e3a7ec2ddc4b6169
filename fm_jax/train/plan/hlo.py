"""The collectives of a compiled step, read from its HLO text: how often, how many bytes, over which mesh axes.

The HLO is that of one device after partitioning. What a loop holds counts once for each trip.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # others are named by their bits: f32, s8, f8e4m3fn, u4

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_EXPLICIT = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{(\{[0-9,{} ]*\})\}")
_MESH = re.compile(r"\breplica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA = re.compile(r"\breplica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_DIMENSION = re.compile(r"\bdimensions=\{(\d+)\}")
_DESCENDS = ("fusion", "call", "while", "conditional", "async-start")


@dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str
    bytes: int  # of the whole array on one device: an all-gather's result, a reduce-scatter's operand
    groups: tuple[tuple[int, ...], ...]  # numbers of the devices that exchange data; () for all of them
    count: int = 1  # executions in one step
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """What the text of a module says."""

    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops with collectives whose number of trips the compiler did not state; counted once


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    text: str


def read(text: str) -> Program:
    """Read the HLO text of a compiled module."""
    computations, entry = _computations(text)
    begun = _begun(computations)
    unknown = 0

    def walk(name: str, times: int) -> Iterator[Collective]:
        nonlocal unknown
        held = computations.get(name, [])
        for instruction in held:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = _CHANNEL.search(instruction.text)
                if channel is None or begun.get(channel[1], name) == name:
                    yield replace(_collective(kind, instruction), count=times)
            elif instruction.opcode in _DESCENDS:
                trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
                for called in _called(instruction):
                    inner = list(walk(called, times * (trips or 1)))
                    unknown += trips is None and bool(inner)
                    yield from _scattered(inner) if "all-reduce-scatter" in called else inner

    return Program(tuple(walk(entry, 1)), unknown)


def axes(groups: tuple[tuple[int, ...], ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ; device i is the i-th of the flattened mesh."""
    sizes = tuple(mesh.values())
    if not groups:
        return tuple(name for name, size in mesh.items() if size > 1)
    places = [np.stack(np.unravel_index(np.array(group), sizes)) for group in groups]
    return tuple(name for row, name in enumerate(mesh) if any(np.ptp(place[row]) for place in places))


def sent(collective: Collective, devices: int) -> float:
    """Return the bytes that one device sends in one execution, by the ring algorithms."""
    ways = max(map(len, collective.groups), default=devices)
    if collective.kind == "collective-permute":
        return collective.bytes
    share = collective.bytes * (ways - 1) / ways
    return 2 * share if collective.kind == "all-reduce" else share


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Split a module into its computations; return them by name, and the name of the entry."""
    held: dict[str, list[_Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            held[name] = []
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            shape, rest = _split(found[2])
            if opcode := _OPCODE.match(rest):
                held[name].append(_Instruction(found[1], opcode[1], shape, rest))
    return held, entry


def _begun(computations: Mapping[str, list[_Instruction]]) -> dict[str, str]:
    """Return {channel: computation} of collectives that the TPU's compiler has spread over several fusions.

    Each of these fusions, from the one that starts the exchange to the one that ends it, holds the instruction.
    """
    begun: dict[str, str] = {}
    for name, held in computations.items():
        if any('custom_call_target="AsyncCollectiveStart"' in one.text for one in held):
            for one in held:
                if one.opcode in KINDS and (channel := _CHANNEL.search(one.text)):
                    begun[channel[1]] = name
    return begun


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int | None:
    """Return the trips that the compiler states, or the bound of a counter from 0; None if neither is there."""
    if stated := _TRIPS.search(loop.text):
        return int(stated[1])
    named = _CONDITION.search(loop.text)
    held = computations.get(named[1], []) if named else []
    bounds = [re.match(r"\s*constant\((\d+)\)", one.text) for one in held if one.opcode == "constant"]
    compared = [one for one in held if one.opcode == "compare" and "direction=LT" in one.text]
    return int(bounds[0][1]) if len(bounds) == 1 and bounds[0] and len(compared) == 1 else None


def _split(text: str) -> tuple[str, str]:
    """Split `SHAPE opcode(…)…` after the shape, which may be a tuple in brackets."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: end + 1], text[end + 1 :]
    return text, ""


def _parts(shape: str) -> list[str]:
    """Return the elements of a tuple's shape, or the shape itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for end, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or not depth:
            parts.append(shape[start:end].strip())
            start = end + 1
    return parts


def _collective(kind: str, instruction: _Instruction) -> Collective:
    shape, scattered = instruction.shape, kind == "reduce-scatter"
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        shape, scattered = _parts(shape)[0 if scattered else 1], False  # (operands, results, …)
    arrays = [(dtype, tuple(map(int, sizes.split(","))) if sizes else ()) for dtype, sizes in _ARRAY.findall(shape)]
    total = sum(math.ceil(math.prod(sizes) * _bits(dtype) / 8) for dtype, sizes in arrays)
    groups = _groups(instruction.text)
    dtype, sizes = max(arrays, key=lambda array: math.prod(array[1]), default=("", ()))
    if scattered:  # only its result is known
        ways, along = max(map(len, groups), default=1), _DIMENSION.search(instruction.text)
        total *= ways
        sizes = tuple(size * ways if along and axis == int(along[1]) else size for axis, size in enumerate(sizes))
    return Collective(kind, total, groups, 1, dtype, sizes)


def _scattered(held: list[Collective]) -> list[Collective]:
    """Return what a fused all-reduce and slice of the TPU's compiler is: a reduce-scatter."""
    return [replace(one, kind="reduce-scatter") if one.kind == "all-reduce" else one for one in held]


def _bits(dtype: str) -> int:
    if dtype in _WIDTH:
        return 8 * _WIDTH[dtype]
    bits = re.match(r"[a-z](\d+)", dtype)
    return int(bits[1]) if bits else 0  # token, opaque: no data


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    if explicit := _EXPLICIT.search(text):
        groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([0-9, ]+)\}", explicit[1])]
        return tuple(groups)
    if named := _MESH.search(text):
        return _along(named[1], named[2])
    if iota := _IOTA.search(text):
        shape, sizes, order = (tuple(map(int, part.split(","))) if part else () for part in iota.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        numbers = numbers.transpose(order) if order else numbers
        return tuple(map(tuple, numbers.reshape(shape).tolist()))
    return ()


def _along(mesh: str, along: str) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices that differ along some axes: "'a'=2,'b'=4", "'b'" or, for a part, "'b':(2)2"."""
    sizes: dict[str, int] = {}
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", along)}
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        before, part = parts.get(name, (1, int(size)))
        sizes |= {f"{name} before": before, name: part, f"{name} after": int(size) // (before * part)}
    names = re.findall(r"'([^']+)'", along)
    order = [name for name in sizes if name not in names] + names
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    numbers = numbers.transpose([list(sizes).index(name) for name in order])
    return tuple(map(tuple, numbers.reshape(-1, math.prod(sizes[name] for name in names)).tolist()))


def _called(instruction: _Instruction) -> list[str]:
    called = _CALLED.findall(instruction.text)
    if branches := _BRANCHES.search(instruction.text):
        called += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return called
