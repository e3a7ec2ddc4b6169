"""The time of a step from what it computes, moves and sends, at the rates that the vendors state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fm_jax.train.chips import Chip
from fm_jax.train.plan import hlo

_FLOAT32_SLOWER = 2  # TensorFloat-32, which NVIDIA's GPUs use for float32 products, has half the peak of bfloat16


@dataclass(frozen=True)
class Traffic:
    """What the collectives of one kind along the same mesh axes do in one step."""

    kind: str
    axes: tuple[str, ...]
    count: int  # executions
    bytes: int  # of the whole arrays, on one chip
    sent: float  # bytes that one chip sends
    ways: int  # chips that exchange data


@dataclass(frozen=True)
class Times:
    """Seconds of one step, each part alone at its full rate."""

    compute: float
    memory: float
    collectives: float

    @property
    def least(self) -> float:
        """Return the time if everything overlaps."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def most(self) -> float:
        """Return the time if the collectives overlap with nothing."""
        return max(self.compute, self.memory) + self.collectives


def traffic(program: hlo.Program, mesh: Mapping[str, int]) -> list[Traffic]:
    """Add up the collectives by kind and mesh axes, largest first; those of one device alone are left out."""
    devices = 1
    for size in mesh.values():
        devices *= size
    sums: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for one in program.collectives:
        key = one.kind, hlo.axes(one.groups, mesh)
        if not key[1]:
            continue
        ways = max(map(len, one.groups), default=devices)
        if one.kind == "collective-permute":  # pairs; the chips that exchange data are those of the axes
            ways = max(mesh[name] for name in key[1])
        old = sums.get(key, Traffic(*key, 0, 0, 0.0, ways))
        total, sent = old.bytes + one.count * one.bytes, old.sent + one.count * hlo.sent(one, devices)
        sums[key] = Traffic(*key, old.count + one.count, total, sent, max(old.ways, ways))
    return sorted(sums.values(), key=lambda held: -held.bytes)


def times(
    chip: Chip,
    flops: Mapping[str, float],
    moved: float,
    collectives: Sequence[Traffic],
    *,
    link: Mapping[int, float],
    tensor_float: bool,
) -> Times:
    """Return the times of one step on one chip.

    Args:
        chip: its rates.
        flops: {dtype: FLOPs} that one chip executes.
        moved: bytes that it reads and writes in its HBM.
        collectives: what it sends.
        link: bytes a second that it sends in a group of so many chips.
        tensor_float: float32 products run at half the bfloat16 peak; otherwise (TPU) as bfloat16.
    """
    slower = {"float32": _FLOAT32_SLOWER} if tensor_float else {}
    compute = sum(count * slower.get(dtype, 1) for dtype, count in flops.items()) / chip.bfloat16
    return Times(compute, moved / chip.bandwidth, sum(one.sent / link[one.ways] for one in collectives))
