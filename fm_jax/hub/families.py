"""Find the family whose file reads a config.json, or writes a module."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from fm_jax.core import sharding, statistics, tree
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.core.types import Params, backbone
from fm_jax.hub.example import Example, Size
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Spec, Weights
from fm_jax.hub.language import bert, gpt2, llama, t5
from fm_jax.hub.multimodal import clip
from fm_jax.hub.table import Table
from fm_jax.hub.vision import efficientnet, faster_rcnn, resnet, vit, yolov3, yolox


class Family(Protocol):
    """What a family's file offers: everything that the rest of the code uses of it."""

    @property
    def KINDS(self) -> Mapping[str, str]:
        """Return {model_type: stem of its class names} for each model_type that the file reads."""
        ...

    def module(self, fields: Fields) -> nn.Module:
        """Build the module that a config.json describes; every field is read or refused."""
        ...

    def fields(self, module: nn.Module) -> dict[str, Any]:
        """Return the config.json from which `Family.module` builds an equal module."""
        ...

    def table(self, module: nn.Module) -> Table:
        """Return the table of the module's tensor names."""
        ...

    def writes(self, module: nn.Module) -> bool:
        """Say whether this family writes the module; at most one family does."""
        ...

    def example(self, module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
        """Draw random inputs of the module; with `Size()` the smallest that initialise it."""
        ...

    def sites(self, module: nn.Module) -> Mapping[str, str]:
        """Return {name of a transformers output: our site} to compare, in order; "layer" stands for every layer."""
        ...


@runtime_checkable
class Settling(Family, Protocol):
    """What a family's file also offers if its config.json leaves something open."""

    def settle(self, module: nn.Module, weights: Weights) -> nn.Module:
        """Return the module in the form that the stored tensors have."""
        ...


@runtime_checkable
class Described(Family, Protocol):
    """What a family's file also offers if its public weights have no config.json beside them."""

    def describe(self, specs: Mapping[str, Spec]) -> dict[str, Any] | None:
        """Return the config.json that names and shapes of stored tensors tell; None if they are another family's."""
        ...


FAMILIES: tuple[Family, ...] = (gpt2, llama, bert, t5, resnet, efficientnet, vit, faster_rcnn, yolox, yolov3, clip)
"""All families. To add one, name its file here and in the import."""

BY_KIND: dict[str, Family] = {kind: family for family in FAMILIES for kind in family.KINDS}
"""model_type -> family."""


def reading(fields: Fields) -> Family:
    """Return the family of a config.json.

    Raises:
        CheckpointError: it names no model_type, or one that is not supported.
    """
    if fields.kind not in BY_KIND:
        known = ", ".join(BY_KIND)
        problem = f"model_type {shown(fields.kind)} is not supported" if fields.kind else "model_type is missing"
        raise CheckpointError(f"{fields.where}: {problem}; supported are {known}")
    return BY_KIND[fields.kind]


def described(weights: Weights) -> Fields | None:
    """Return the config.json that stored tensors tell by themselves; None if no family knows them."""
    told = (family.describe(weights.specs) for family in FAMILIES if isinstance(family, Described))
    return next((Fields(data, weights.where) for data in told if data is not None), None)


def build(fields: Fields, ignore: Iterable[str] = ()) -> tuple[Family, nn.Module]:
    """Return family and module of a config.json; every field except those in `ignore` must be known.

    Raises:
        CheckpointError: a field is unknown, unsupported or invalid.
    """
    family = reading(fields)
    try:
        module = family.module(fields)
    except ConfigError as error:
        raise CheckpointError(f"{fields.where}: {error}") from None
    fields.close(ignore)
    return family, module


def settled(family: Family, module: nn.Module, weights: Weights) -> nn.Module:
    """Return the module in the form of the stored weights, if the family's config.json leaves that open."""
    return family.settle(module, weights) if isinstance(family, Settling) else module


def writing(module: nn.Module) -> Family:
    """Return the family that writes a module.

    Raises:
        CheckpointError: transformers has no such model.
    """
    for family in FAMILIES:
        if family.writes(module):
            return family
    raise CheckpointError(f"transformers has no class for a {type(backbone(module)).__name__}")


def abstract(module: nn.Module, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """Return shape, dtype and (with a mesh) sharding of every parameter of a module, without allocating any.

    Running statistics are float32 whatever the dtype: in bfloat16 one training step would be too small to change them.
    """
    inputs = writing(module).example(module, np.random.default_rng(0), Size()).inputs
    boxed = jax.eval_shape(lambda key: module.init(key, **inputs), jax.random.key(0))["params"]
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
