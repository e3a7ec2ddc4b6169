"""Open the vision backbone that an earlier stage left: a run of this project, or a public folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from fm_jax.checkpoint import read
from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data import vision
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.vision import efficientnet, resnet, vit

BACKBONES: tuple[tuple[type, type[nn.Module]], ...] = (
    (resnet.Config, resnet.ResNet),
    (efficientnet.Config, efficientnet.EfficientNet),
    (vit.Config, vit.ViT),
)
SECTIONS = ("backbone", "model")  # where a run's config keeps its backbone's


def load(source: str | Path, *, dtype: Dtype = "float32", mesh: Mesh | None = None) -> Pretrained:
    """Read the backbone of a run's best checkpoint (the last, if none was judged), or of a folder of `transformers`.

    A run's model has its backbone under "backbone/…" and that one's config in a section named "backbone" or "model";
    its head, projection or decoder stays behind. So do a folder's classes.

    Args:
        source: a run's work directory; or what `hub.pretrained.load` takes.
        dtype: of the computation, and of a folder's parameters.
        mesh: puts a folder's parameters in their shards; a run's go to the first local device.

    Returns:
        A module that has `features(image) -> [B, D]`, and its parameters.

    Raises:
        CheckpointError: nothing there, something damaged, or a model that reads no images.
    """
    if (workdir := _run(source)) is None:
        module, params = public.load(source, dtype=dtype, mesh=mesh).backbone()
        if not hasattr(module, "features"):
            raise CheckpointError(f"{source} holds an {type(module).__name__}, which has no features of an image")
        return Pretrained(module, params, None)
    checkpoints, step = workdir / "checkpoints", _step(workdir)
    module = _module(workdir, read.load_meta(checkpoints, step)["config"])
    params = read.load_params(checkpoints, step)
    if "backbone" not in params:
        raise CheckpointError(f"{workdir} has no parameters named backbone/…; it holds {', '.join(params)}")
    return Pretrained(public.computing(module, dtype), params["backbone"], None)


def images(source: str | Path) -> vision.Config | None:
    """Return what a run was trained on, and how it saw it; None for a folder, which says nothing of that.

    Raises:
        CheckpointError: nothing there, or a run on something else than images.
    """
    if (workdir := _run(source)) is None:
        return None
    config = read.load_meta(workdir / "checkpoints", _step(workdir))["config"]
    try:
        return from_dict(vision.Config, config["data"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{workdir} was not trained on images: {error}") from error


def _run(source: str | Path) -> Path | None:
    """Return the work directory of a run of ours; None for what is a folder or a public name."""
    workdir = Path(source)
    # OWNER/NAME may be fetched; runs/NAME is a run that was never made, and so is what lacks in a folder that is there
    if not workdir.exists() and (workdir.parts[:1] == ("runs",) or workdir.parent.is_dir()):
        raise CheckpointError(f"{workdir} does not exist; give a run's work directory or a model's folder")
    return workdir if (workdir / "checkpoints").is_dir() or (workdir / "run.json").is_file() else None


def _step(workdir: Path) -> str:
    return "best" if read.ranked(workdir / "checkpoints") else "last"


def _module(workdir: Path, config: Mapping[str, Any]) -> nn.Module:
    """Return the backbone that a run's config is of."""
    found = next((config[name] for name in SECTIONS if isinstance(config.get(name), Mapping)), None)
    problems = []
    for kind, module in BACKBONES:
        try:
            return module(from_dict(kind, found or {}))
        except (ConfigError, TypeError) as error:
            problems.append(f"{module.__name__}: {error}")
    raise CheckpointError(f"{workdir} is no run of a vision backbone ({'; '.join(problems)})")
