"""What a training starts from: a run of this project, a folder as `transformers` writes it, or a public name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm_jax.checkpoint import read
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Params


@dataclass(frozen=True)
class Init:
    """What a training starts from."""

    from_: Path | None = None  # a run's work directory, a folder, or OWNER/NAME; none: weights drawn anew
    revision: str | None = None  # of OWNER/NAME: a commit, or a branch or tag, whose commit is printed

    def __post_init__(self) -> None:
        """Refuse a revision of nothing."""
        if self.revision is not None and self.from_ is None:
            raise ConfigError(f"revision {self.revision} is of nothing: set from to OWNER/NAME")

    @property
    def source(self) -> Path:
        """Return where the model is, for what cannot start without one.

        Raises:
            ConfigError: none is named.
        """
        if self.from_ is None:
            raise ConfigError("init.from names no model to start from; give a run's work directory or a model's folder")
        return self.from_


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier stage left in its work directory."""

    workdir: Path
    step: str  # of its checkpoints
    meta: dict[str, Any]  # that was saved with it

    @property
    def config(self) -> dict[str, Any]:
        """Return its config, as JSON data."""
        config: dict[str, Any] = self.meta["config"]
        return config

    def params(self, combine: Callable[[Params, Params], Params] = tree.merge) -> Params:
        """Read its parameters to the first local device; `combine` makes them of (trained, frozen).

        Of a run that kept a running mean that is what is read: it was evaluated, and judged which step is best.
        """
        part = "params" if self.config.get("ema_decay") is None else "ema"
        return read.load_params(self.workdir / "checkpoints", self.step, part=part, combine=combine)


def open_run(source: str | Path, revision: str | None = None, step: str = "best") -> EarlierRun | None:
    """Open what is the work directory of a run; None for what is a folder or a public name.

    Args:
        source: see `Init.from_`.
        revision: see `Init.revision`.
        step: "best" (the last, if none was judged), "last" or a number.

    Raises:
        CheckpointError: a path that does not exist, no such step, or a revision of a run.
    """
    workdir = Path(source)
    # OWNER/NAME may be fetched; runs/NAME is a run that was never made, and so is what lacks in a folder that is there
    if not workdir.exists() and (workdir.parts[:1] == ("runs",) or workdir.parent.is_dir()):
        raise CheckpointError(f"{workdir} does not exist; give a run's work directory, a model's folder, or OWNER/NAME")
    checkpoints = workdir / "checkpoints"
    if not checkpoints.is_dir() and not (workdir / "run.json").is_file():
        return None
    if revision is not None:
        raise CheckpointError(f"{workdir} is a run and has no revision {revision!r}; leave the revision out")
    step = "last" if step == "best" and not read.ranked(checkpoints) else step
    return EarlierRun(workdir, step, read.load_meta(checkpoints, step))
