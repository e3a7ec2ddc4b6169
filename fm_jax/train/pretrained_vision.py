"""Open the vision backbone that an earlier stage left: a run of this project, or a public folder."""

from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
from jax.sharding import Mesh

from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data import vision
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.vision import efficientnet, mae, resnet, vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.train import start

BACKBONES: tuple[tuple[type, type[nn.Module]], ...] = (
    (resnet.Config, resnet.ResNet),
    (efficientnet.Config, efficientnet.EfficientNet),
    (vit.Config, vit.ViT),
)
SECTIONS = ("backbone", "model")  # where a run's config keeps its backbone's


def load(
    source: str | Path, *, revision: str | None = None, dtype: Dtype = "float32", mesh: Mesh | None = None
) -> Pretrained:
    """Read the backbone of a run's best checkpoint (the last, if none was judged), or of a folder of `transformers`.

    A run's model has its backbone under "backbone/…" and that one's config in a section named "backbone" or "model";
    its head, projection or decoder stays behind. So do a folder's classes.

    Args:
        source: a run's work directory; or what `hub.pretrained.load` takes.
        revision: of a public name.
        dtype: of the computation, and of a folder's parameters.
        mesh: puts a folder's parameters in their shards; a run's go to the first local device.

    Returns:
        A module that has `features(image) -> [B, D]`, and its parameters.

    Raises:
        CheckpointError: nothing there, something damaged, or a model that reads no images.
    """
    if (run := start.run(source, revision)) is None:
        module, params = public.load(source, dtype=dtype, mesh=mesh, revision=revision).backbone()
        if not hasattr(module, "features"):
            raise CheckpointError(f"{source} holds an {type(module).__name__}, which has no features of an image")
        return Pretrained(module, params, None)
    module, params = of_run(run).backbone()
    return Pretrained(public.computing(module, dtype), params, None)


def of_run(run: start.Run) -> Pretrained:
    """Return what a run trained, in the form in which it is published.

    That is a classifier with its classes' names, a masked autoencoder, or of what was trained by contrast the backbone.

    Raises:
        CheckpointError: a run of something else.
    """
    backbone, params = _backbone(run), run.params()
    if "backbone" not in params:
        raise CheckpointError(f"{run.workdir} has no parameters named backbone/…; it holds {', '.join(params)}")
    if isinstance(backbone, vit.ViT) and "decoder" in params:
        return Pretrained(mae.MAE(from_dict(mae.Config, run.config["decoder"]), backbone), params, None)
    if names := run.meta.get("classes"):
        module = ImageClassifier(backbone, len(names), run.config.get("dropout", 0.0))
        return Pretrained(module, params, None, tuple(names))
    return Pretrained(backbone, params["backbone"], None)


def images(source: str | Path) -> vision.Config | None:
    """Return what a run was trained on, and how it saw it; None for a folder, which says nothing of that.

    Raises:
        CheckpointError: nothing there, or a run on something else than images.
    """
    if (run := start.run(source)) is None:
        return None
    try:
        return from_dict(vision.Config, run.config["data"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run.workdir} was not trained on images: {error}") from error


def _backbone(run: start.Run) -> nn.Module:
    """Return the backbone that a run's config is of."""
    found = next((run.config[name] for name in SECTIONS if isinstance(run.config.get(name), Mapping)), None)
    problems = []
    for kind, module in BACKBONES:
        try:
            return module(from_dict(kind, found or {}))
        except (ConfigError, TypeError) as error:
            problems.append(f"{module.__name__}: {error}")
    raise CheckpointError(f"{run.workdir} is no run of a vision backbone ({'; '.join(problems)})")
