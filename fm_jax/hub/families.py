"""Which family's file reads a config.json, and which writes a module."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from fm_jax.core import sharding, tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Params, backbone
from fm_jax.hub import bert, efficientnet, gpt2, llama, resnet, t5, vit
from fm_jax.hub.fields import Fields
from fm_jax.hub.table import Table
from fm_jax.hub.weights import Weights
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from fm_jax.models.vision.efficientnet import EfficientNet
from fm_jax.models.vision.resnet import ResNet
from fm_jax.models.vision.vit import ViT
from fm_jax.objectives import statistics


class Family(Protocol):
    """What a family's file offers."""

    def module(self, fields: Fields) -> nn.Module:
        """Build the module that a config.json describes; every field is accounted for."""
        ...

    def fields(self, module: nn.Module) -> dict[str, Any]:
        """Return the config.json from which `module` builds an equal one."""
        ...

    def table(self, module: nn.Module) -> Table:
        """Return the names of the module's tensors."""
        ...

    def inputs(self, module: nn.Module) -> tuple[np.ndarray, ...]:
        """Return the smallest inputs that the module can be initialised with."""
        ...


@runtime_checkable
class Settling(Family, Protocol):
    """What a family's file offers beyond that, where a config.json leaves something open."""

    def settle(self, module: nn.Module, weights: Weights) -> nn.Module:
        """Return the module in the form that the stored tensors show."""
        ...


FAMILIES: dict[str, Family] = {
    "gpt2": gpt2,
    "gpt_neo": gpt2,
    **dict.fromkeys(llama.KINDS, llama),
    **dict.fromkeys(bert.KINDS, bert),
    **dict.fromkeys(t5.KINDS, t5),
    "resnet": resnet,
    "efficientnet": efficientnet,
    **dict.fromkeys(vit.KINDS, vit),
}


def reading(fields: Fields) -> Family:
    """Return the family that a config.json belongs to.

    Raises:
        CheckpointError: it names none, or one that is not here.
    """
    if fields.kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        found = f"model_type {fields.kind!r} is" if fields.kind else "it names no model_type, which is"
        raise CheckpointError(f"{fields.where}: {found} not supported; supported are {known}")
    return FAMILIES[fields.kind]


def build(fields: Fields, ignore: Iterable[str] = ()) -> tuple[Family, nn.Module]:
    """Return family and module of a config.json, every field of which is accounted for, but for those in `ignore`.

    Raises:
        CheckpointError: something in it is unknown, unsupported or impossible.
    """
    family = reading(fields)
    try:
        module = family.module(fields)
    except ConfigError as error:
        raise CheckpointError(f"{fields.where}: {error}") from None
    fields.close(ignore)
    return family, module


def settled(family: Family, module: nn.Module, weights: Weights) -> nn.Module:
    """Return the module in the form that the file holds, where the family's config.json leaves that open."""
    return family.settle(module, weights) if isinstance(family, Settling) else module


def writing(module: nn.Module) -> Family:
    """Return the family that writes a module.

    Raises:
        CheckpointError: no other library has such a model.
    """
    bare = backbone(module)
    if isinstance(bare, Decoder):
        return llama if bare.cfg.attention.rope else gpt2
    if isinstance(bare, Encoder):
        return bert
    if isinstance(bare, EncoderDecoder):
        return t5
    if isinstance(bare, ResNet):
        return resnet
    if isinstance(bare, EfficientNet):
        return efficientnet
    if isinstance(bare, ViT):
        return vit
    raise CheckpointError(f"a {type(bare).__name__} has no form in another library")


def abstract(module: nn.Module, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """Return shape, dtype and (with a mesh) sharding of every parameter of a module, without making any.

    Running statistics are float32 whatever the dtype: in bfloat16 a step of training would not move them.
    """
    inputs = writing(module).inputs(module)
    boxed = jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))["params"]
    bare = meta.unbox(boxed)
    running = tree.flatten(statistics.split(bare)[1])
    plain = tree.map_with_path(
        lambda path, leaf: leaf if path in running else jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype)), bare
    )
    if mesh is None:
        return plain
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        plain,
        sharding.shardings(boxed, mesh),
    )
