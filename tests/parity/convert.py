"""transformers' models in our terms, through the hub's own tables: their config -> our module, their tensors -> ours.

Works on weights and on gradients alike, for every transform is a linear rearrangement.
"""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.types import Params
from fm_jax.hub import families, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays


def module(theirs: Mapping[str, Any]) -> nn.Module:
    """Translate a transformers config, as `to_dict()` gives it; every field of it is accounted for."""
    return families.build(Fields(json.loads(json.dumps(theirs, default=str)), "the peer's config"))[1]


def params(module: nn.Module, tensors: Mapping[str, np.ndarray]) -> Params:
    """Rename, rearrange and stack; every tensor is used or this raises."""
    arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    return table.read(families.writing(module).table(module), families.abstract(module), Arrays(arrays))
