"""Open a pretrained vision backbone: a run of this project, or a public checkpoint."""

import logging
from collections.abc import Iterable
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

Backbone = resnet.Config | efficientnet.Config | vit.Config  # the backbones that an option can choose


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    step: str = "best",
    dtype: Dtype = "float32",
    mesh: Mesh | None = None,
    ignore: Iterable[str] = (),
    shapes: bool = False,
) -> Pretrained:
    """Read the backbone of a run's checkpoint, or of a public checkpoint.

    The head, projection or decoder of the model is not returned, and neither are its class names.

    Args:
        source: a run's work directory, a checkpoint folder, or OWNER/NAME.
        revision: commit, branch or tag of OWNER/NAME.
        step: checkpoint of a run: "best" (the last, if none was evaluated), "last" or a step number.
        dtype: computation dtype, and the dtype of a folder's parameters.
        mesh: shards a folder's parameters; those of a run go to the first local device.
        ignore: unknown fields of a folder's config.json that do not change the computation.
        shapes: give the parameters' shapes and read no weights: enough for a run that is resumed.

    Returns:
        A module with `features(image) -> [B, D]`, and its parameters.

    Raises:
        CheckpointError: the source is missing or damaged, or its model does not read images.
    """
    ignore = tuple(ignore)
    run = open_run(source, revision, step, ignore=ignore)
    if run is None:
        model = public.load(source, dtype=dtype, mesh=mesh, revision=revision, ignore=ignore, shapes=shapes)
    else:
        model = of_run(run, shapes=shapes)
    module, params = model.backbone()
    if not isinstance(module, Featured):
        raise CheckpointError(f"{source} has a model of class {type(module).__name__}, which does not read images")
    return Pretrained(public.computing(module, dtype), params, None, preprocessing=model.preprocessing)


def of_run(run: EarlierRun, *, shapes: bool = False) -> Pretrained:
    """Return the trained model of a run, in the form that is exported; `shapes` as in `load`.

    This is a classifier with its class names, a masked autoencoder, or, for a contrastive run, its backbone.

    Raises:
        CheckpointError: the run's model does not read images.
    """
    module, bare = run.model(), backbone(run.model())
    if not isinstance(bare, Featured):
        raise CheckpointError(f"{run.workdir} trained a {type(module).__name__}, which does not read images")
    seen, names = preprocessing.of(_data(run)), run.classes
    if module is bare or any(family.writes(module) for family in families.FAMILIES):
        return Pretrained(module, families.abstract(module) if shapes else run.params(), None, names, seen)
    params = families.abstract(bare) if shapes else run.params()["backbone"]
    return Pretrained(bare, params, None, preprocessing=seen)


def images(source: str | Path) -> pictures.Config | None:
    """Return a run's training data and preprocessing; None for a public checkpoint, which names no data.

    Raises:
        CheckpointError: the source is missing, or its run was not trained on images.
    """
    return _data(run) if (run := open_run(source)) else None


def as_trained(model: Pretrained, data: pictures.Config) -> pictures.Config:
    """Return `data` with the model's preprocessing in all fields that are at their defaults."""
    if model.preprocessing is None:
        return data
    wanted, plain = preprocessing.onto(data, model.preprocessing), pictures.Config()
    names = [
        name
        for name in ("size", "mean", "std", "center_crop", "stretch")
        if getattr(data, name) == getattr(plain, name)
    ]
    recipe = wanted.recipe if data.recipe.interpolation == plain.recipe.interpolation else data.recipe
    return replace(data, recipe=recipe, **{name: getattr(wanted, name) for name in names})


def remind(model: Pretrained, data: pictures.Config) -> str:
    """Return, and print as a warning, the options that match the pretrained preprocessing; "" if all match."""
    if model.preprocessing is None:
        return ""
    seen, like = model.preprocessing, preprocessing.onto(data, model.preprocessing)
    same = {"size"}  # that is a matter of choice
    if round(seen.size / data.center_crop) == seen.scaled:  # a folder has whole pixels: 274 of 240 / 0.875
        same.add("center_crop")
    wanted = {name: words for name, words in changes(data, like).items() if name not in same}
    if not wanted:
        return ""
    options = " ".join(f"--data.{name} {after}" for name, (_, after) in wanted.items())
    text = f"image preprocessing differs from the pretrained model's; to match it, add: {options}"
    _log.warning("%s", text)
    return text


def _data(run: EarlierRun) -> pictures.Config:
    try:
        return from_dict(pictures.Config, run.config["data"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run.workdir} was not trained on images: {error}") from error
