"""Describe the model of a run in its checkpoints, and build it again: its class and the values of its fields.

A class is looked up in the table below and never imported by name, so a checkpoint cannot name code to run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fm_jax.core.config import from_dict, to_dict
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.sentence import SentenceEncoder
from fm_jax.models.language.span import SpanFinder
from fm_jax.models.language.tagger import Tagger
from fm_jax.models.multimodal.clip import CLIP, ImageTower, TextTower
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.efficientnet import EfficientNet
from fm_jax.models.vision.faster_rcnn import FasterRCNN
from fm_jax.models.vision.mae import MAE
from fm_jax.models.vision.resnet import ResNet
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.models.vision.vit import ViT
from fm_jax.models.vision.yolov3 import YOLOv3
from fm_jax.models.vision.yolox import YOLOX

_ALLOWED: tuple[type[nn.Module], ...] = (
    *(Classifier, Decoder, Encoder, EncoderDecoder, MaskedLM, SentenceEncoder, SpanFinder, Tagger),
    *(EfficientNet, FasterRCNN, ImageClassifier, MAE, ResNet, SimCLR, ViT, YOLOv3, YOLOX),
    *(CLIP, ImageTower, TextTower),
)


def name(cls: type) -> str:
    """Return the name of a class in checkpoints, such as "vision.vit.ViT"."""
    return f"{cls.__module__.removeprefix('fm_jax.models.')}.{cls.__name__}"


CLASSES: dict[str, type[nn.Module]] = {name(cls): cls for cls in _ALLOWED}


def describe(module: nn.Module) -> dict[str, Any]:
    """Return the JSON data from which `build` makes an equal module.

    Raises:
        ConfigError: the class is not in the table, so the run could not be opened again.
    """
    if name(type(module)) not in CLASSES:
        raise ConfigError(f"{name(type(module))} is not among the classes of fm_jax/checkpoint/model.py; add it there")
    data: dict[str, Any] = {"class": name(type(module))}
    for field in _fields(type(module)):
        value = getattr(module, field.name)
        data[field.name] = describe(value) if isinstance(value, nn.Module) else to_dict(value)
    return data


def build(meta: Mapping[str, Any], where: str) -> nn.Module:
    """Return the model that a checkpoint's meta describes; `where` names the run in messages.

    Raises:
        CheckpointError: meta has no model, its class is unknown, or its fields do not fit.
    """
    if "model" not in meta:
        git = meta.get("git")
        revision = git.get("revision") if isinstance(git, Mapping) else None
        revision = revision or "the revision that trained it"
        raise CheckpointError(
            f"{where} does not name its model: an older version wrote it; check out {revision}, convert the run with "
            "experiments.hub.hub_convert, and open the folder that it writes"
        )
    return _build(meta["model"], where)


def of(cfg: Any) -> nn.Module:
    """Return the model whose only field is such a config.

    Raises:
        ConfigError: there is no such model.
    """
    for cls in _ALLOWED:
        if [field.type for field in _fields(cls)] == [type(cfg)]:
            return cls(cfg)
    raise ConfigError(f"no class of fm_jax/checkpoint/model.py can be made of a {name(type(cfg))} alone")


def _build(data: Any, where: str) -> nn.Module:
    called = data.get("class") if isinstance(data, Mapping) else None
    if not isinstance(called, str) or called not in CLASSES:
        raise CheckpointError(
            f"{where} trained a model of class {shown(called or data)}, which is unknown; "
            f"known are {', '.join(CLASSES)}"
        )
    cls, values = CLASSES[called], {key: value for key, value in data.items() if key != "class"}
    kinds = {field.name: field.type for field in _fields(cls)}
    if unknown := sorted(values.keys() - kinds):
        raise CheckpointError(f"{where}: a {called} has no {', '.join(unknown)}; it may need a later version of fm_jax")
    try:
        return cls(**{key: _value(kinds[key], value, where) for key, value in values.items()})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: its {called} cannot be built: {error}") from error


def _value(kind: Any, data: Any, where: str) -> Any:
    """Return a field's value: a module from its own description, anything else from config data."""
    inner = isinstance(kind, type) and issubclass(kind, nn.Module)
    return _build(data, where) if inner else from_dict(kind, data)


def _fields(cls: type[nn.Module]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a module except those that Flax adds to every module."""
    return [field for field in dataclasses.fields(cls) if field.name not in ("parent", "name")]
