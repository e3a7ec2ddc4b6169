"""What a plan found: printed for people, written as plan.json for programs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fm_jax.train.plan.roofline import Times, Traffic


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip."""

    weights: int  # parameters, trained or not, and their EMA
    optimizer: int
    batch: int
    activations: int  # the compiler's temporaries: activations, gradients, gathered weights
    peak: int  # all of it at once, as the compiler has laid it out
    host: int = 0  # offloaded to the host's memory
    usable: float  # HBM that a program may take


@dataclass(frozen=True, kw_only=True)
class Report:
    """A step compiled for chips that need not be here."""

    target: str  # CHIP:TOPOLOGY
    chips: int
    mesh: Mapping[str, int]
    batch: Mapping[str, tuple[int, ...]]  # field -> shape, over all chips
    accumulate: int
    missing: str  # "", or the command that installs the chip's compiler: all figures are then estimates
    parameters: int
    trained: int
    model_flops: float  # of one step by the experiment's formula; 0 if it states none
    flops: Mapping[str, int]  # {dtype: FLOPs} of one step that all chips together execute
    memory: Memory
    collectives: tuple[Traffic, ...] = ()
    unknown_loops: int = 0
    times: Times | None = None  # None: it did not compile, for want of memory
    largest: tuple[str, ...] = ()  # the largest collectives, in words
    resharded: tuple[str, ...] = ()  # arrays that the partitioner gathers whole, for want of another way to move them

    @property
    def fits(self) -> bool:
        """Say whether the step's peak fits in the chip's HBM."""
        return self.times is not None and self.memory.peak <= self.memory.usable

    def json(self) -> dict[str, Any]:
        """Return the report as JSON data, in bytes, FLOPs and seconds."""
        data = asdict(self)
        if self.times is not None:
            data["times"] |= {"least": self.times.least, "most": self.times.most}
        return {**data, "estimate": bool(self.missing), "fits": self.fits}

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        axes = " × ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one chip"
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.batch.items())
        yield f"plan for {self.target}: {self.chips} chips, mesh {axes}; nothing was run"
        if self.missing:
            yield (
                "ESTIMATE: compiled for virtual CPU devices, whose compiler fuses less and has other collectives; "
                f"for the chip's own compiler: {self.missing}"
            )
        accumulated = f" in {self.accumulate} microbatches" if self.accumulate > 1 else ""
        yield f"  batch           {shapes}{accumulated}"
        frozen = self.parameters - self.trained
        yield f"  parameters      {self.parameters:,}" + (f", of which {frozen:,} frozen" if frozen else "")
        total = sum(self.flops.values())
        by_dtype = ", ".join(f"{dtype} {count / total:.0%}" for dtype, count in self.flops.items()) if total else ""
        formula = f"; {self.model_flops:.3g} by the model's formula" if self.model_flops else ""
        yield f"  FLOPs a step    {total:.3g} executed ({by_dtype}), {total / self.chips:.3g} a chip{formula}"
        yield from self._memory()
        yield from self._collectives()
        yield from self._time()

    def _memory(self) -> Iterator[str]:
        held = self.memory
        parts = f"weights {amount(held.weights)}, optimiser {amount(held.optimizer)}, batch {amount(held.batch)}"
        yield f"  bytes a chip    {parts}, activations and other temporaries {amount(held.activations)}"
        if held.host:
            yield f"  on the host     {amount(held.host)} a chip"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        yield f"  peak a chip     {amount(held.peak)} of {amount(held.usable)} HBM: {verdict}"

    def _collectives(self) -> Iterator[str]:
        for one in self.collectives:
            over = " × ".join(one.axes)
            size = f"{amount(one.bytes)}, {amount(one.sent)} sent by a chip"
            yield f"  {one.kind:<15} over {over}: {one.count} executions, {size}"
        if self.largest:
            yield f"  largest         {'; '.join(self.largest)}"
        if self.resharded:
            yield f"  gathered whole  {len(self.resharded)} (involuntary full rematerialisation): {self.resharded[0]}"
        if self.unknown_loops:
            yield f"  {self.unknown_loops} loops with collectives have an unknown number of trips and are counted once"

    def _time(self) -> Iterator[str]:
        if (times := self.times) is None:
            return
        parts = f"compute {_ms(times.compute)}, HBM {_ms(times.memory)}, collectives {_ms(times.collectives)}"
        yield f"  roofline        {parts}"
        least, most = _ms(times.least), _ms(times.most)
        yield f"  step time       at least {least} (all overlaps) to {most} (no collective overlaps)"
        yield (
            "  assumptions     peak rates of the data sheets; FLOPs split evenly; each microbatch reads the weights "
            "twice, writes and reads its temporaries and what is exchanged; ring collectives on one axis of the torus, "
            "or NVLink; no input or host time"
        )


def amount(count: float) -> str:
    """Return bytes as text, with enough digits to tell two settings apart."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
