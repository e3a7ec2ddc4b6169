"""Open the model that a training starts from: a run of this project, a checkpoint folder, or a public name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint import read, seal
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.core.types import Params


@dataclass(frozen=True)
class Init:
    """The model that a training starts from."""

    from_: Path | None = None  # a run's work directory, a checkpoint folder, or OWNER/NAME; none: random initialisation
    revision: str | None = None  # commit, branch or tag of OWNER/NAME; the commit is printed
    ignore: tuple[str, ...] = ()  # unknown fields of its config.json, if you know that they change no result

    def __post_init__(self) -> None:
        """Refuse a revision, or fields to ignore, without a model."""
        if self.revision is not None and self.from_ is None:
            raise ConfigError(f"revision {self.revision} needs a public model: set from to OWNER/NAME")
        if self.ignore and self.from_ is None:
            raise ConfigError(f"ignore {','.join(self.ignore)} needs a public model: set from to its folder or name")

    @property
    def source(self) -> Path:
        """Return `from_`, for experiments that cannot start without a model.

        Raises:
            ConfigError: `from_` is not set.
        """
        if self.from_ is None:
            raise ConfigError("init.from is not set; give a run's work directory, a checkpoint folder, or OWNER/NAME")
        return self.from_


@dataclass(frozen=True)
class EarlierRun:
    """The checkpoint of an earlier run."""

    workdir: Path
    step: str  # "best", "last" or a number
    meta: dict[str, Any]  # saved with the checkpoint

    @property
    def config(self) -> dict[str, Any]:
        """Return the run's config as JSON data.

        Raises:
            CheckpointError: the checkpoint holds none.
        """
        config = self.meta.get("config")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.workdir} holds {shown(config)} as its config, not a JSON object")
        return config

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of a classifier's classes; () if the checkpoint holds none.

        Raises:
            CheckpointError: it holds something else.
        """
        names = self.meta.get("classes", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.workdir} holds {shown(names)} as its classes, not a list of names")
        return tuple(names)

    def model(self) -> nn.Module:
        """Return the trained model, as the checkpoint describes it.

        Raises:
            CheckpointError: it describes no model, or one that this version cannot build.
        """
        return models.build(self.meta, str(self.workdir))

    def params(self, combine: Callable[[Params, Params], Params] = tree.merge) -> Params:
        """Read the parameters to the first local device; `combine` merges (trained, frozen).

        If the run kept an EMA, the EMA is read: it was evaluated and selected the best step.
        """
        part = "params" if self.config.get("ema_decay") is None else "ema"
        return read.load_params(self.workdir / "checkpoints", self.step, part=part, combine=combine)


def resumes(workdir: Path) -> bool:
    """Return whether a run has a checkpoint of its own to go on from: it then needs no pretrained weights."""
    return bool(seal.steps(workdir / "checkpoints"))


def open_run(
    source: str | Path, revision: str | None = None, step: str = "best", *, ignore: Iterable[str] = ()
) -> EarlierRun | None:
    """Open a run's work directory; return None for a checkpoint folder or a public name.

    Args:
        source: see `Init.from_`.
        revision: see `Init.revision`.
        step: "best" (the last, if none was evaluated), "last" or a number.
        ignore: see `Init.ignore`.

    Raises:
        CheckpointError: the path or the step does not exist, or a revision or fields to ignore are given for a run.
    """
    workdir = Path(source)
    # OWNER/NAME may be downloaded. A missing runs/NAME can only be a run, and so can a missing path in an existing
    # folder.
    if not workdir.exists() and (workdir.parts[:1] == ("runs",) or workdir.parent.is_dir()):
        raise CheckpointError(
            f"{workdir} does not exist; give a run's work directory, a checkpoint folder, or OWNER/NAME"
        )
    checkpoints = workdir / "checkpoints"
    if not checkpoints.is_dir() and not (workdir / "run.json").is_file():
        return None
    if revision is not None:
        raise CheckpointError(f"{workdir} is a run, which has no revision {revision!r}; remove the revision")
    if fields := tuple(ignore):
        raise CheckpointError(f"{workdir} is a run, which has no config.json; do not ignore {', '.join(fields)} there")
    step = "last" if step == "best" and not read.ranked(checkpoints) else step
    return EarlierRun(workdir, step, read.load_meta(checkpoints, step))
