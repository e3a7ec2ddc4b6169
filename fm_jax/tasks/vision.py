"""Open the vision backbone that an earlier stage left: a run of this project, or a public folder."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
from jax.sharding import Mesh

from fm_jax.core.config import changes, from_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data import vision
from fm_jax.hub import preprocessing
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.vision import efficientnet, mae, resnet, vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.tasks.init import EarlierRun, open_run

_log = logging.getLogger(__name__)

BACKBONES: tuple[tuple[type, type[nn.Module]], ...] = (
    (resnet.Config, resnet.ResNet),
    (efficientnet.Config, efficientnet.EfficientNet),
    (vit.Config, vit.ViT),
)
Backbone = resnet.Config | efficientnet.Config | vit.Config
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
    run = open_run(source, revision)
    found = of_run(run) if run else public.load(source, dtype=dtype, mesh=mesh, revision=revision)
    module, params = found.backbone()
    if not hasattr(module, "features"):
        raise CheckpointError(
            f"{source} holds a model of class {type(module).__name__}, which has no features of an image"
        )
    return Pretrained(public.computing(module, dtype), params, None, preprocessing=found.preprocessing)


def of_run(run: EarlierRun) -> Pretrained:
    """Return what a run trained, in the form in which it is published.

    That is a classifier with its classes' names, a masked autoencoder, or of what was trained by contrast the backbone.

    Raises:
        CheckpointError: a run of something else.
    """
    backbone, params = _backbone(run), run.params()
    if "backbone" not in params:
        raise CheckpointError(f"{run.workdir} has no parameters named backbone/…; it holds {', '.join(params)}")
    seen = preprocessing.of(_data(run))
    if isinstance(backbone, vit.ViT) and "decoder" in params:
        module = mae.MAE(from_dict(mae.Config, run.config["decoder"]), backbone)
        return Pretrained(module, params, None, preprocessing=seen)
    if names := run.meta.get("classes"):
        classifier = ImageClassifier(backbone, len(names), run.config.get("dropout", 0.0))
        return Pretrained(classifier, params, None, tuple(names), seen)
    return Pretrained(backbone, params["backbone"], None, preprocessing=seen)


def images(source: str | Path) -> vision.Config | None:
    """Return what a run was trained on, and how it saw it; None for a folder, which says nothing of that.

    Raises:
        CheckpointError: nothing there, or a run on something else than images.
    """
    return _data(run) if (run := open_run(source)) else None


def as_trained(found: Pretrained, data: vision.Config) -> vision.Config:
    """Return data that a model sees as it was trained to, in all that is left at its default."""
    if found.preprocessing is None:
        return data
    wanted, plain = preprocessing.onto(data, found.preprocessing), vision.Config()
    names = [
        name for name in ("size", "mean", "std", "middle", "stretch") if getattr(data, name) == getattr(plain, name)
    ]
    recipe = wanted.recipe if data.recipe.interpolation == plain.recipe.interpolation else data.recipe
    return replace(data, recipe=recipe, **{name: getattr(wanted, name) for name in names})


def remind(found: Pretrained, data: vision.Config) -> str:
    """Return, and print as a warning, which options show a model its images as it was trained on them; "" if all do."""
    if found.preprocessing is None:
        return ""
    seen, like = found.preprocessing, preprocessing.onto(data, found.preprocessing)
    same = {"size"}  # that is a matter of choice
    if round(seen.size / data.middle) == seen.scaled:  # a folder has whole pixels: 274 of 240 / 0.875
        same.add("middle")
    wanted = {name: words for name, words in changes(data, like).items() if name not in same}
    if not wanted:
        return ""
    options = " ".join(f"--data.{name} {after}" for name, (_, after) in wanted.items())
    text = f"the pretrained model saw its images otherwise than this run shows them; to show them alike: {options}"
    _log.warning("%s", text)
    return text


def _data(run: EarlierRun) -> vision.Config:
    try:
        return from_dict(vision.Config, run.config["data"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run.workdir} was not trained on images: {error}") from error


def build(cfg: Backbone) -> nn.Module:
    """Return the backbone that a config is of: it has `features(image) -> [B, D]`."""
    return next(module(cfg) for kind, module in BACKBONES if isinstance(cfg, kind))


def _backbone(run: EarlierRun) -> nn.Module:
    """Return the backbone that a run's config is of."""
    found = next((run.config[name] for name in SECTIONS if isinstance(run.config.get(name), Mapping)), None)
    # a run that takes several kinds says which, by the name of a class
    stored = {name: value for name, value in (found or {}).items() if name != "class"}
    problems = []
    for kind, module in BACKBONES:
        try:
            return module(from_dict(kind, stored))
        except (ConfigError, TypeError) as error:
            problems.append(f"{module.__name__}: {error}")
    raise CheckpointError(f"{run.workdir} is no run of a vision backbone ({'; '.join(problems)})")
