"""Which family's file reads a config.json, and which writes a module."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from fm_jax.core import sharding, statistics, tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Params, backbone
from fm_jax.hub.example import Example, Size
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Weights
from fm_jax.hub.language import bert, gpt2, llama, t5
from fm_jax.hub.table import Table
from fm_jax.hub.vision import efficientnet, resnet, vit


class Family(Protocol):
    """What a family's file offers: all that the rest of the house has to know of it."""

    @property
    def KINDS(self) -> Mapping[str, str]:
        """Return model_type -> stem of the names of its classes, of each that the file reads."""
        ...

    def module(self, fields: Fields) -> nn.Module:
        """Build the module that a config.json describes; every field is accounted for."""
        ...

    def fields(self, module: nn.Module) -> dict[str, Any]:
        """Return the config.json from which `module` builds an equal one."""
        ...

    def table(self, module: nn.Module) -> Table:
        """Return the names of the module's tensors."""
        ...

    def writes(self, module: nn.Module) -> bool:
        """Say whether the family writes a module: no other one does."""
        ...

    def example(self, module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
        """Draw what the module is called with: with `Size()` the smallest that initialises it."""
        ...

    def sites(self, module: nn.Module) -> Mapping[str, str]:
        """Return {name of an output there: our site} of what is compared, in order; "layer" is every layer's."""
        ...


@runtime_checkable
class Settling(Family, Protocol):
    """What a family's file offers beyond that, where a config.json leaves something open."""

    def settle(self, module: nn.Module, weights: Weights) -> nn.Module:
        """Return the module in the form that the stored tensors show."""
        ...


FAMILIES: tuple[Family, ...] = (gpt2, llama, bert, t5, resnet, efficientnet, vit)
"""Every family that is here. A new one is its file's name in this line and in the import."""

BY_KIND: dict[str, Family] = {kind: family for family in FAMILIES for kind in family.KINDS}
"""model_type -> family."""


def reading(fields: Fields) -> Family:
    """Return the family that a config.json belongs to.

    Raises:
        CheckpointError: it names none, or one that is not here.
    """
    if fields.kind not in BY_KIND:
        known = ", ".join(BY_KIND)
        found = f"model_type {fields.kind!r} is" if fields.kind else "it names no model_type, which is"
        raise CheckpointError(f"{fields.where}: {found} not supported; supported are {known}")
    return BY_KIND[fields.kind]


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
    for family in FAMILIES:
        if family.writes(module):
            return family
    raise CheckpointError(f"a {type(backbone(module)).__name__} has no form in another library")


def abstract(module: nn.Module, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """Return shape, dtype and (with a mesh) sharding of every parameter of a module, without making any.

    Running statistics are float32 whatever the dtype: in bfloat16 a step of training would not move them.
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
