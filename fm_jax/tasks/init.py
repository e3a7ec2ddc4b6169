"""Open the model that a training starts from: a run of this project, a checkpoint folder, or a public name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import flax.linen as nn

from fm_jax.checkpoint import model as models
from fm_jax.checkpoint import read, seal
from fm_jax.core import tree
from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.core.types import Params
from fm_jax.peft import freeze, lora
from fm_jax.train.plan import target as targets


class Options(TypedDict):
    """How the model that a training starts from is opened; see `Init`."""

    revision: str | None
    step: str
    ignore: tuple[str, ...]


@dataclass(frozen=True)
class Init:
    """The model that a training starts from."""

    from_: Path | None = None  # a run's work directory, a checkpoint folder, or OWNER/NAME; none: random initialisation
    revision: str | None = None  # commit, branch or tag of OWNER/NAME; the commit is printed
    step: str = "best"  # checkpoint of a run: "best" (the last, if none was evaluated), "last" or a step number
    ignore: tuple[str, ...] = ()  # unknown fields of its config.json, if you know that they change no result

    def __post_init__(self) -> None:
        """Refuse a revision, a step, or fields to ignore, without a model."""
        check_step(self.step)
        if self.revision is not None and self.from_ is None:
            raise ConfigError(f"revision {self.revision} needs a public model: set from to OWNER/NAME")
        if self.step != "best" and self.from_ is None:
            raise ConfigError(f"step {self.step} needs a run: set from to its work directory")
        if self.ignore and self.from_ is None:
            raise ConfigError(f"ignore {','.join(self.ignore)} needs a public model: set from to its folder or name")

    @property
    def options(self) -> Options:
        """Return all but `from_`, as `load` in `tasks/language.py` and `tasks/vision.py` takes them."""
        return {"revision": self.revision, "step": self.step, "ignore": self.ignore}

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
    step: int
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

    def folder_of(self, name: str) -> Path:
        """Return the verified folder with the checkpoint's own `name`/…; else the run's, as earlier versions left it.

        Raises:
            CheckpointError: a file of the folder is damaged or cannot be read.
        """
        own = self.workdir / "checkpoints" / str(self.step)
        if kept := [file for file in seal.manifest(own) if file.startswith(f"{name}/")]:
            for file in kept:
                seal.read(own, file)
            return own / name
        return self.workdir / name

    def params(self, combine: Callable[[Params, Params], Params] | None = None) -> Params:
        """Read the parameters to the first local device.

        If the run kept an EMA, the EMA is read: it was evaluated and selected the best step.

        Args:
            combine: (trained, frozen) -> the model's parameters; by default as the run's config says.
        """
        if combine is None:
            method = str(self.config.get("method", ""))
            options = from_dict(lora.Config, self.config["lora"]) if method == "lora" else lora.Config()
            combine = combining(method, options)
        part = "params" if self.config.get("ema_decay") is None else "ema"
        return read.load_params(self.workdir / "checkpoints", self.step, part=part, combine=combine)


def check_step(step: str) -> None:
    """Refuse a step that is no "best", "last" or number."""
    if step not in ("best", "last") and not (step.isascii() and step.isdecimal()):
        raise ConfigError(f"step {step!r} is not best, last or the number of a checkpoint")


def combining(method: str, options: lora.Config) -> Callable[[Params, Params], Params]:
    """Return the function (trained, frozen) -> the model's parameters of a method; by default a merge."""
    return {"lora": lora.combine(options), "frozen": freeze.combine}.get(method, tree.merge)


def resumes(workdir: Path) -> bool:
    """Return whether a run has a checkpoint of its own to go on from: it then needs no pretrained weights.

    A run that is only planned (`--plan`) needs none either: their shapes are enough.

    Raises:
        CheckpointError: the run has begun, but its checkpoints are gone or cannot be listed.
    """
    return targets.current() is not None or read.to_resume(workdir) is not None


def open_run(
    source: str | Path, revision: str | None = None, step: str = "best", *, ignore: Iterable[str] = ()
) -> EarlierRun | None:
    """Open a run's work directory; return None for a checkpoint folder or a public name.

    Args:
        source: see `Init.from_`.
        revision: see `Init.revision`.
        step: see `Init.step`.
        ignore: see `Init.ignore`.

    Raises:
        CheckpointError: the path or the step does not exist, a revision or fields to ignore are given for a run, or a
            step for another source; or a step that may be the best is damaged, so that another would take its place.
    """
    check_step(step)
    workdir = Path(source)
    # OWNER/NAME may be downloaded. A missing runs/NAME can only be a run, and so can a missing path in an existing
    # folder.
    if not seal.there(workdir) and (workdir.parts[:1] == ("runs",) or workdir.parent.is_dir()):
        raise CheckpointError(
            f"{workdir} does not exist; give a run's work directory, a checkpoint folder, or OWNER/NAME"
        )
    checkpoints = workdir / "checkpoints"
    if not seal.there(checkpoints) and not seal.there(workdir / "run.json"):
        if step != "best":
            raise CheckpointError(f"{workdir} is not a run's work directory, so it has no step {step}; remove the step")
        return None
    if revision is not None:
        raise CheckpointError(f"{workdir} is a run, which has no revision {revision!r}; remove the revision")
    if fields := tuple(ignore):
        raise CheckpointError(f"{workdir} is a run, which has no config.json; do not ignore {', '.join(fields)} there")
    step = "last" if step == "best" and read.best(checkpoints) is None else step
    number = int(read.folder(checkpoints, step).name)  # one step, even if the run goes on and saves a better one
    return EarlierRun(workdir, number, read.load_meta(checkpoints, number))
