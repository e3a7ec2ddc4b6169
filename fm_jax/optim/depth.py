"""The depth of a parameter: which leaves are stacked by layer, and how far each is from the output.

Repeated blocks are under a node named `blocks`, with layers on axis 0; lookup tables and patch projections under
`embed`, except a stack's relative position bias, its `bias/table`; the task's output layer under `head`. An adapter
under `lora/` has the depth of its target.
"""

import re
from typing import Any

import numpy as np

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params

STACKED = r"(?:.*/)?blocks/.*"
EMBEDDINGS = r"(?:.*/)?embed/.*"
DISTANCES = r"(?:.*/)?bias/table"
HEADS = r"(?:.*/)?head/.*"


def layers(path: str, leaf: Any) -> int:
    """Return the number of layers stacked on axis 0 of a leaf; 0 for a leaf that is not stacked."""
    if not re.fullmatch(STACKED, path):
        return 0
    if not leaf.shape:
        raise ConfigError(f"{path} is under `blocks` but is a scalar; stacked leaves need the layers on axis 0")
    return int(leaf.shape[0])


def rank(path: str, leaf: Any) -> int:
    """Return the number of axes of a leaf without the layer axis: a bias stacked [L, D] has rank 1."""
    return len(leaf.shape) - (layers(path, leaf) > 0)


def multipliers(params: Params, decay: float) -> Params:
    """Return each leaf's factor on the learning rate: a float, or an array [L, 1, …] for stacked layers.

    Counted from the top, as in BEiT: block l of L gets decay^(L - l), so the topmost gets `decay`; embeddings get
    decay^(L + 1), even if the token table is tied to the head; head, final norm and all others get 1. Parts of a model
    (without frozen bottom layers, adapters) thus keep the factors of the whole. With several stacks each counts from
    its own top, and the embeddings are below the tallest. ELECTRA, the origin, gives the topmost block decay^2 instead.

    Source: Clark et al. 2020 (model/optimization.py of google-research/electra); Bao et al. 2022 (BEiT), as counted in
    util/lr_decay.py of facebookresearch/mae.
    """
    deepest = max((layers(path, leaf) for path, leaf in tree.flatten(params).items()), default=0)

    def factor(path: str, leaf: Any) -> Any:
        if count := layers(path, leaf):
            powers = decay ** np.arange(count, 0, -1, dtype=np.float32)
            return powers.reshape((count,) + (1,) * (len(leaf.shape) - 1))
        return decay ** (deepest + 1) if re.fullmatch(EMBEDDINGS, path) else 1.0

    return tree.map_with_path(factor, params)
