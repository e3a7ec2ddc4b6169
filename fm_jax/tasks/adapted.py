"""Put the LoRA adapters of a `peft` folder on a loaded model: merged into its weights, or beside them to train on."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn

from fm_jax.core import tree
from fm_jax.core.types import Params
from fm_jax.hub import adapter
from fm_jax.hub.pretrained import Pretrained
from fm_jax.peft import lora


class Adapted(NamedTuple):
    """A model with adapters beside its weights; its parameters are `lora.combine(cfg)(trained, frozen)`."""

    module: nn.Module
    trained: Params  # adapters and fully trained leaves, as `peft/lora.py` has them
    frozen: Params
    cfg: lora.Config
    base: str  # the base model that the folder names, or ""


def attach(model: Pretrained, folder: str | Path, *, ignore: Iterable[str] = ()) -> Adapted:
    """Return a model and the adapters of a folder, which a training can go on with.

    A head that is tied to the embedding becomes a copy of it if the adapters change one of the two alone.

    Args:
        model: the base model of the adapters.
        folder: a folder written by `peft`.
        ignore: unknown fields of adapter_config.json that do not change the computation.

    Raises:
        CheckpointError: a damaged folder, an unsupported kind of adapter, or one of another model.
    """
    module, params = adapter.untied(folder, model.module, model.params)
    found = adapter.load(folder, module, ignore=ignore)
    whole = tree.unflatten(tree.flatten(params) | tree.flatten(found.replaced))
    _, frozen = tree.partition(whole, found.trainable)
    cfg = lora.Config(found.rank, found.alpha, found.targets, found.trainable)
    return Adapted(module, found.trained, frozen, cfg, found.base)


def merged(model: Pretrained, folder: str | Path, *, ignore: Iterable[str] = ()) -> Pretrained:
    """Return a model with the adapters of a folder merged into its weights, in their dtype; see `attach`."""
    module, trained, frozen, cfg, _ = attach(model, folder, ignore=ignore)
    dtypes = {path: leaf.dtype for path, leaf in tree.flatten(model.params).items()}
    params = tree.map_with_path(
        lambda path, leaf: leaf.astype(dtypes.get(path, leaf.dtype)), lora.merge(trained, frozen, cfg)
    )
    return replace(model, module=module, params=params)
