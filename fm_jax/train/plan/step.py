"""Compile the step of a stage for chips that are not here; nothing is run and no array is made."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from fm_jax.core import sharding, tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.train import state as states
from fm_jax.train.plan import flops, hlo, roofline, warned
from fm_jax.train.plan.report import Memory, Report
from fm_jax.train.plan.target import Target, with_cudnn
from fm_jax.train.state import TrainState

_USED = re.compile(r"Used ([0-9.]+)([KMGT]) of ([0-9.]+)([KMGT]) hbm", re.IGNORECASE)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SHOWN = 3  # largest collectives that are named


class Compiled(Exception):
    """Ends an experiment that is planned, in the place where it would train."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.target)
        self.report = report


class _Rows(Protocol):
    def iterate(self, start: int) -> Iterator[Mapping[str, np.ndarray]]: ...


def compile_step(
    target: Target,
    step: Any,
    create: Callable[[Params, Params], TrainState],
    make_params: Callable[[], tuple[Params, Params]],
    rows: _Rows,
    mesh: Mesh,
    *,
    layout: Params | None,
    batch_size: int,
    accumulate: int,
    last: int,
    model_flops: float,
) -> Report:
    """Compile a step as the loop would, with its state donated, and report what the compiler says of it.

    Args:
        target: the chips.
        step: the step, to be jitted.
        create: (trained, frozen) -> the state before the first step.
        make_params: only traced.
        rows: batches with the fields of the real ones; of one of them only the shapes of the rows are used.
        mesh: mesh of the target's devices.
        layout: the whole model's `state.layout`.
        batch_size: rows of the real batch.
        accumulate: microbatches of a step.
        last: number of the last step, whose rows are the longest where lengths grow.
        model_flops: FLOPs of a step by the model's formula; 0 if unknown.

    Raises:
        ConfigError: the experiment gives no layout.
    """
    if layout is None:
        raise ConfigError("--plan: this training has no layout of its parameters, so it cannot be planned")
    state = states.abstract(create, *states.traced(make_params, layout, mesh), mesh)
    batch = _batch(rows, batch_size, last, mesh)
    with jax.set_mesh(mesh), with_cudnn(target):
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        counted = flops.count(traced.jaxpr)
        facts: dict[str, Any] = {
            "target": target.name,
            "chips": mesh.size,
            "mesh": dict(mesh.shape),
            "batch": {name: field.shape for name, field in batch.items()},
            "accumulate": accumulate,
            "missing": target.missing,
            "parameters": tree.count(state.params) + tree.count(state.frozen),
            "trained": tree.count(state.params),
            "model_flops": model_flops,
            "flops": dict(counted),
        }
        try:
            with warned.uncached(), warned.heard() as whole:
                compiled = traced.lower().compile(compiler_options=target.options)
        except jax.errors.JaxRuntimeError as error:
            return Report(**facts, memory=_held(state, batch, target, _needed(error)))
    return _measured(compiled, {**facts, "resharded": tuple(whole)}, state, batch, target, mesh)


def _needed(error: Exception) -> int:
    """Return the bytes that a compiler says it would need, 0 if it does not say; raise any other error again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    used = _USED.search(str(error))
    return int(float(used[1]) * _UNIT[used[2].upper()]) if used else 0


def _measured(
    compiled: Any, facts: dict[str, Any], state: TrainState, batch: Any, target: Target, mesh: Mesh
) -> Report:
    said = compiled.memory_analysis()
    peak = (
        said.argument_size_in_bytes
        + said.output_size_in_bytes
        - said.alias_size_in_bytes
        + said.temp_size_in_bytes
        + said.generated_code_size_in_bytes
    )
    host = said.host_temp_size_in_bytes + said.host_argument_size_in_bytes + said.host_output_size_in_bytes
    memory = _held(state, batch, target, peak, said.temp_size_in_bytes, host)
    program = hlo.read(compiled.as_text())
    collectives = roofline.traffic(program, mesh.shape)
    # Each microbatch reads the weights forward and backward, and writes and reads its temporaries.
    parts = facts["accumulate"]
    moved = (2 * parts + 1) * memory.weights + 2 * memory.optimizer + 2 * parts * memory.activations + memory.batch
    moved += 2 * sum(one.bytes for one in collectives)
    times = roofline.times(
        target.chip,
        {dtype: count / mesh.size for dtype, count in facts["flops"].items()},
        moved,
        collectives,
        link={one.ways: target.link(one.ways) for one in collectives},
        tensor_float=target.is_gpu,
    )
    return Report(
        **facts,
        memory=memory,
        collectives=tuple(collectives),
        unknown_loops=program.unknown_loops,
        times=times,
        largest=tuple(_largest(program, mesh)),
    )


def _largest(program: hlo.Program, mesh: Mesh) -> Iterator[str]:
    counts, sizes = Counter[str](), Counter[str]()
    for one in program.collectives:
        if hlo.axes(one.groups, mesh.shape):
            name = f"{one.kind} {one.dtype}[{','.join(map(str, one.shape))}]"
            counts[name] += one.count
            sizes[name] += one.count * one.bytes
    for name, _ in sizes.most_common(_SHOWN):
        yield name + (f" ×{counts[name]}" if counts[name] > 1 else "")


def _held(state: TrainState, batch: Any, target: Target, peak: int, temporary: int = 0, host: int = 0) -> Memory:
    return Memory(
        weights=_bytes((state.params, state.frozen, state.ema)),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(batch),
        activations=temporary,
        peak=peak,
        host=host,
        usable=target.usable,
    )


def _bytes(shapes: Any) -> int:
    """Return the bytes of one chip's shards."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        size = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        total += size * leaf.dtype.itemsize
    return total


def _batch(rows: _Rows, batch_size: int, last: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a whole batch from those of a few rows."""
    few = next(iter(rows.iterate(last)))
    where = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, *field.shape[1:]), jax.dtypes.canonicalize_dtype(field.dtype), sharding=where
        )
        for name, field in few.items()
    }
