"""Open the vision backbone that an earlier stage left: a run of this project, or a public folder."""

import logging
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from fm_jax.core.config import changes, from_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Featured, backbone
from fm_jax.data.images import pictures
from fm_jax.hub import families, preprocessing
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.vision import efficientnet, resnet, vit
from fm_jax.tasks.init import EarlierRun, open_run

_log = logging.getLogger(__name__)

Backbone = resnet.Config | efficientnet.Config | vit.Config  # what an option may choose among


def load(
    source: str | Path, *, revision: str | None = None, dtype: Dtype = "float32", mesh: Mesh | None = None
) -> Pretrained:
    """Read the backbone of a run's best checkpoint (the last, if none was judged), or of a folder of `transformers`.

    The head, projection or decoder of a run's model stays behind. So do a folder's classes.

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
    if not isinstance(module, Featured):
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
    module, bare = run.model(), backbone(run.model())
    if not isinstance(bare, Featured):
        raise CheckpointError(f"{run.workdir} trained a {type(module).__name__}, which has no features of an image")
    params, seen, names = run.params(), preprocessing.of(_data(run)), tuple(run.meta.get("classes", ()))
    if module is bare or any(family.writes(module) for family in families.FAMILIES):
        return Pretrained(module, params, None, names, seen)
    return Pretrained(bare, params["backbone"], None, preprocessing=seen)


def images(source: str | Path) -> pictures.Config | None:
    """Return what a run was trained on, and how it saw it; None for a folder, which says nothing of that.

    Raises:
        CheckpointError: nothing there, or a run on something else than images.
    """
    return _data(run) if (run := open_run(source)) else None


def as_trained(found: Pretrained, data: pictures.Config) -> pictures.Config:
    """Return data that a model sees as it was trained to, in all that is left at its default."""
    if found.preprocessing is None:
        return data
    wanted, plain = preprocessing.onto(data, found.preprocessing), pictures.Config()
    names = [
        name
        for name in ("size", "mean", "std", "center_crop", "stretch")
        if getattr(data, name) == getattr(plain, name)
    ]
    recipe = wanted.recipe if data.recipe.interpolation == plain.recipe.interpolation else data.recipe
    return replace(data, recipe=recipe, **{name: getattr(wanted, name) for name in names})


def remind(found: Pretrained, data: pictures.Config) -> str:
    """Return, and print as a warning, which options show a model its images as it was trained on them; "" if all do."""
    if found.preprocessing is None:
        return ""
    seen, like = found.preprocessing, preprocessing.onto(data, found.preprocessing)
    same = {"size"}  # that is a matter of choice
    if round(seen.size / data.center_crop) == seen.scaled:  # a folder has whole pixels: 274 of 240 / 0.875
        same.add("center_crop")
    wanted = {name: words for name, words in changes(data, like).items() if name not in same}
    if not wanted:
        return ""
    options = " ".join(f"--data.{name} {after}" for name, (_, after) in wanted.items())
    text = f"the pretrained model saw its images otherwise than this run shows them; to show them alike: {options}"
    _log.warning("%s", text)
    return text


def _data(run: EarlierRun) -> pictures.Config:
    try:
        return from_dict(pictures.Config, run.config["data"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run.workdir} was not trained on images: {error}") from error
