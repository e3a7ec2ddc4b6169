"""Which family's file reads a config.json, and which writes a module."""

from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from fm_jax.core import sharding
from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import Params
from fm_jax.hub import gpt2, llama
from fm_jax.hub.fields import Fields
from fm_jax.hub.table import Table
from fm_jax.models.language.decoder import Decoder


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


FAMILIES: dict[str, Family] = {"gpt2": gpt2, "gpt_neo": gpt2, **dict.fromkeys(llama.KINDS, llama)}


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


def writing(module: nn.Module) -> Family:
    """Return the family that writes a module.

    Raises:
        CheckpointError: no other library has such a model.
    """
    backbone = getattr(module, "backbone", module)
    if isinstance(backbone, Decoder):
        return llama if backbone.cfg.attention.rope else gpt2
    raise CheckpointError(f"a {type(backbone).__name__} has no form in another library")


def abstract(module: nn.Module, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """Return shape, dtype and (with a mesh) sharding of every parameter of a module, without making any."""
    inputs = writing(module).inputs(module)
    boxed = jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))["params"]
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype)), meta.unbox(boxed))
    if mesh is None:
        return plain
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        plain,
        sharding.shardings(boxed, mesh),
    )
