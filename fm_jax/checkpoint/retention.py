"""Delete old checkpoints. Only a step whose record was read and ranked may go; everything else stays."""

import logging
import shutil
from pathlib import Path

from fm_jax.checkpoint import read, seal
from fm_jax.core.errors import CheckpointError

_log = logging.getLogger(__name__)


def choose(
    directory: Path, *, keep_last: int, keep_best: int, metric: str | None
) -> tuple[list[int], dict[int, CheckpointError]]:
    """Return the steps to delete, and what is wrong with those that cannot be judged, which stay.

    A step that cannot be judged takes no place among the last or the best. So whatever its value is, the best steps of
    all are kept: each of them is either not judged, or among the best of the judged.
    """
    known, unknown = read.records(directory)
    kept = set(sorted(known)[-keep_last:])
    # a run that goes on under another metric keeps the best step of the earlier one
    for name in {metric, *(record["metric"] for record in known.values())} - {None}:
        kept |= set(read.ranked(known, name)[:keep_best])
    return [step for step in sorted(known) if step not in kept], unknown


def delete(directory: Path, steps: list[int], *, newest: int) -> None:
    """Delete steps, and what interrupted saves before `newest`, which is sealed, and interrupted deletions left."""
    aside = directory / read.UNSEALED
    for left in aside.iterdir():
        if left.name.isdecimal() and int(left.name) < newest:
            _log.warning("removed the unfinished checkpoint %s; %d is sealed", left, newest)
            shutil.rmtree(left)
        elif left.name.endswith(".deleted"):
            shutil.rmtree(left)
    for step in steps:
        # Rename first, so that a half-deleted step never looks sealed.
        (directory / str(step)).rename(gone := aside / f"{step}.deleted")
        seal.sync_folder(directory)
        shutil.rmtree(gone)
