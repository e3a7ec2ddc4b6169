"""Where a parameter sits: which leaves are stacked by layer, and how far each is from the output.

Repeated blocks live under a node named `blocks`, layers on axis 0; lookup tables and patch projections under
`embed`, but for that of a stack's biases by distance, its `bias/table`; what maps to the task's outputs under `head`.
An adapter under `lora/` sits where its target does.
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
    """Return how many layers a leaf holds on axis 0; 0 for a leaf that is not stacked."""
    if not re.fullmatch(STACKED, path):
        return 0
    if not leaf.shape:
        raise ConfigError(f"{path} stands under `blocks` but is a scalar; stacked leaves have the layers on axis 0")
    return int(leaf.shape[0])


def rank(path: str, leaf: Any) -> int:
    """Return the number of axes of one layer's part: a bias stacked [L, D] has rank 1."""
    return len(leaf.shape) - (layers(path, leaf) > 0)


def multipliers(params: Params, decay: float) -> Params:
    """Return each leaf's factor on the learning rate: a float, or an array [L, 1, …] where layers are stacked.

    Counted from the top, as in BEiT: head, final norm and all else 1; block l of L decay^(L - l), so the topmost
    has `decay`; embeddings decay^(L + 1), also where the token table is tied to the head. Parts of a model (frozen
    bottom layers, adapters) thus keep the factors of the whole. Of several stacks each counts from its own top, and
    the embeddings lie below the tallest. ELECTRA, where the idea is from, gives the topmost block decay^2 instead.

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
