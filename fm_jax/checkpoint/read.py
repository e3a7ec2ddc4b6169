"""Read sealed checkpoints: their records, and their arrays onto any devices. Nothing here writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fm_jax.checkpoint import leaves, seal
from fm_jax.checkpoint.together import agree
from fm_jax.core import json_file, tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import Params

RECORD = "checkpoint.json"
LATE = "metrics.json"
"""Metrics of a step that was saved before they were measured."""
UNSEALED = "unsealed"
"""Folder of the saves and deletions in progress, beside the steps."""


def load_params(
    directory: str | Path,
    step: int | str = "last",
    abstract: Params | None = None,
    *,
    part: str = "params",
    combine: Callable[[Params, Params], Params] = tree.merge,
) -> Params:
    """Verify a sealed step and read only the model's parameters, including frozen ones, onto any devices.

    Args:
        directory: the directory of a `Store`; with several processes all of them must call this.
        step: a step, "last" or "best".
        abstract: ShapeDtypeStructs with shardings whose names, shapes and dtypes the result must have; by default
            every array is put whole on the first local device.
        part: "params", or "ema" for their exponential moving average.
        combine: (part, frozen) -> the model's parameters, as in training.

    Raises:
        CheckpointError: no sealed step, a damaged file, or other parameters than `abstract`.
    """
    source = folder(Path(directory).absolute(), step)  # Orbax refuses a relative path
    known = stored(record(source))
    chosen = {name: sig for name, sig in known.items() if name.startswith((f"{part}/", "frozen/"))}
    if not any(name.startswith(f"{part}/") for name in chosen):
        raise CheckpointError(f"checkpoint {source} has no {part}; it has {', '.join(_tops(known))}")
    places = tree.flatten(abstract) if abstract is not None else {}

    def target(name: str, signature: leaves.Signature) -> jax.ShapeDtypeStruct:
        like = places.get(name.partition("/")[2])
        bare = jax.ShapeDtypeStruct(signature[1], np.dtype(signature[0]))
        return leaves.abstract(like if like is not None and leaves.signature(like) == signature else bare)

    if abstract is not None and combine is tree.merge:  # check before reading
        _same({name.partition("/")[2]: signature for name, signature in chosen.items()}, places, source)
    state = tree.unflatten(arrays(source, {name: target(name, signature) for name, signature in chosen.items()}))
    params = combine(state[part], state.get("frozen", {}))
    if abstract is not None:
        _same({name: leaves.signature(leaf) for name, leaf in tree.flatten(params).items()}, places, source)
    return params


def load_meta(directory: str | Path, step: int | str = "last") -> dict[str, Any]:
    """Return the `meta` (config, versions, devices, git revision) saved with a step."""
    return record(folder(Path(directory), step))["meta"]


def folder(directory: Path, step: int | str) -> Path:
    """Return the folder of a sealed step, "last" or "best".

    Raises:
        CheckpointError: there is none; or a step that may be the last or the best is damaged or cannot be read, so that
            another one would be chosen in its place.
    """
    steps, cut = seal.steps(directory), seal.unsealed(directory)
    step = int(step) if isinstance(step, str) and step.isdecimal() else step
    if step == "best":
        if (first := best(directory)) is None:
            raise CheckpointError(f"no checkpoint in {directory} has a metric, so none is best; give a step or 'last'")
        return directory / str(first)
    if step == "last" and steps:
        if cut and cut[-1] > steps[-1]:
            raise seal.missing(directory / str(cut[-1]))
        return directory / str(steps[-1])
    if step in steps:
        return directory / str(step)
    if step in cut:
        raise seal.missing(directory / str(step))
    there = f"it has {', '.join(map(str, steps[-8:]))}" if steps else "it has no sealed checkpoint"
    there += f" (unfinished: {', '.join(map(str, cut[-8:]))})" if cut else ""
    raise CheckpointError(f"no checkpoint {step!r} in {directory}; {there}")


def best(directory: Path, metric: str | None = None) -> int | None:
    """Return the step with the lowest value of a metric, on a tie the earliest; None if no step has the metric.

    Args:
        directory: the directory of a `Store`.
        metric: name of the metric; by default the one that the newest step names.

    Raises:
        CheckpointError: a step is damaged, unsealed or cannot be read, and may be the best.
    """
    known, unknown = records(directory)
    unknown |= {step: seal.missing(directory / str(step)) for step in seal.unsealed(directory)}
    if unknown:
        raise CheckpointError(f"the best step is unknown: {unknown[min(unknown)]}")
    newest_first = (known[step]["metric"] for step in sorted(known, reverse=True))
    ranked_steps = ranked(known, metric or next((name for name in newest_first if name is not None), None))
    return ranked_steps[0] if ranked_steps else None


def records(directory: Path) -> tuple[dict[int, dict[str, Any]], dict[int, CheckpointError]]:
    """Return the records of the sealed steps, and what is wrong with those whose record is damaged or not readable."""
    known: dict[int, dict[str, Any]] = {}
    unknown: dict[int, CheckpointError] = {}
    for step in seal.steps(directory):
        folder = directory / str(step)
        try:
            known[step] = record(folder)
        except CheckpointError as error:
            if seal.there(folder):  # else a training that is running has deleted it
                unknown[step] = error
    return known, unknown


def ranked(known: Mapping[int, Mapping[str, Any]], metric: str | None) -> list[int]:
    """Return the steps whose record has the metric, lowest value first."""
    values = [(record["metrics"].get(metric), step) for step, record in known.items()]
    return [step for value, step in sorted((v, s) for v, s in values if isinstance(v, int | float))]


def to_resume(workdir: Path) -> int | None:
    """Return the sealed step from which a training in this work directory goes on; None if it has not begun.

    Raises:
        CheckpointError: the training has begun, but its checkpoints are gone: it would silently start from scratch.
    """
    directory = workdir / "checkpoints"
    if steps := seal.steps(directory):
        return steps[-1]
    anew = f"put the checkpoints back in {directory}, or start anew with another --workdir"
    if cut := seal.unsealed(directory):
        raise CheckpointError(f"none of the checkpoints {', '.join(map(str, cut[-8:]))} has a {seal.SEAL}; {anew}")
    if seal.there(workdir / "results.json"):
        raise CheckpointError(f"the run has finished (it has results.json), but it has no checkpoint; {anew}")
    # a store makes this folder before the first line of the log is written, and never removes it
    if seal.there(workdir / "metrics.jsonl") and not seal.there(directory / UNSEALED):
        raise CheckpointError(f"the run has begun (it has metrics.jsonl), but its checkpoints are gone; {anew}")
    return None


def record(folder: Path) -> dict[str, Any]:
    """Return a sealed step's record: step, metric, metrics, data, meta, leaves.

    Raises:
        CheckpointError: it is damaged, or something else than a record was sealed.
    """
    data = json_file.parse(seal.read(folder, RECORD), str(folder / RECORD), CheckpointError)
    kinds = {"step": int, "metric": str | None, "metrics": dict, "data": dict, "meta": dict, "leaves": dict}
    wrong = [
        name
        for name, kind in kinds.items()
        if not isinstance(data, dict) or name not in data or not isinstance(data[name], kind)
    ]
    if wrong or not all(leaves.is_signature(leaf) for leaf in data["leaves"].values()):
        raise seal.damaged(folder, RECORD, f"it has no valid {(*wrong, 'leaves')[0]}")
    return data if data["metrics"] else {**data, "metrics": seal.added(folder, LATE) or {}}


def stored(record: Mapping[str, Any]) -> dict[str, leaves.Signature]:
    """Return dtype and shape of every array of a record."""
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in record["leaves"].items()}


def arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Verify a sealed step and read the named arrays into the given shardings.

    Raises:
        CheckpointError: on every process, if any process finds a damaged file.
    """
    error = None
    try:
        seal.verify(folder, share=(jax.process_index(), jax.process_count()))
    except CheckpointError as damage:
        error = damage
    agree(error)
    target = tree.unflatten(dict(wanted))
    # Not StandardRestore: it cannot restore a part of the tree.
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as reader:
            state = reader.restore(folder / "state", args=args)
    except Exception as problem:
        raise seal.failure(f"reading checkpoint {folder}", problem) from problem
    return leaves.named(state)


def _same(available: dict[str, leaves.Signature], abstract: dict[str, Any], folder: Path) -> None:
    wanted = {name: leaves.signature(leaf) for name, leaf in abstract.items()}
    if problems := leaves.differences(available, wanted):
        raise CheckpointError(f"checkpoint {folder} is of another model: {leaves.listing(problems, 5)}")


def _tops(names: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in names))
