"""A case of any family: our model with the peer's weights, the peer's answer in our terms, and how far ours is.

Needs torch and transformers, unlike the families' files.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fm_jax.core import statistics, tree
from tests.parity import convert
from tests.parity.all_families import FAMILY
from tests.parity.distances import distances

TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU
Change = Callable[[Any, Any], tuple[Any, Any]]  # (our module, parameters) -> the same, one of them wrong


@cache
def expected(case: str, *, moved: bool = True) -> tuple[Any, Any, dict[str, Any]]:
    """Return (our module, our parameters, the peer's answer in our terms)."""
    return in_our_terms(case, FAMILY[case].peer(case, moved=moved))


def in_our_terms(case: str, peer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the same of a peer that was made before."""
    family, module = FAMILY[case], convert.module(peer.config.to_dict())
    answer = family.theirs(case, peer)
    gradients, _ = statistics.split(convert.params(module, answer["gradients"]))
    return module, convert.params(module, family.tensors(peer)), {**answer, "gradients": gradients}


@cache
def program(case: str, module: Any) -> Any:
    """Return a jitted params -> our answer."""
    return FAMILY[case].ours(module, FAMILY[case].batch(case))


def measured(case: str, *, moved: bool = True) -> dict[str, float]:
    """Return how far our answer is from the peer's."""
    module, params, peer = expected(case, moved=moved)
    return distances(program(case, module)(params), peer, FAMILY[case].INSIDES)


def changed(case: str, change: Change, answer: tuple[Any, Any, dict[str, Any]] | None = None) -> dict[str, float]:
    """Return how far a changed model's outputs and loss are, and the gradients of parameters that both have."""
    module, params, peer = answer or expected(case)
    module, params = change(module, params)
    return shared(case, program(case, module)(params), peer)


def shared(case: str, mine: Any, peer: Any) -> dict[str, float]:
    """Return the distances of what a wrong variant has in common with the peer: states may not be."""
    (got, want), peer = _common(mine["gradients"], peer["gradients"]), {**peer, "states": {}}
    return distances({**mine, "gradients": got}, {**peer, "gradients": want}, FAMILY[case].INSIDES)


def _common(one: Any, two: Any) -> tuple[Any, Any]:
    """Leave out what the other does not have, or in another shape."""
    flat = tree.flatten(one), tree.flatten(two)
    both = {path for path in flat[0].keys() & flat[1].keys() if np.shape(flat[0][path]) == np.shape(flat[1][path])}
    first, second = ({path: leaf for path, leaf in each.items() if path in both} for each in flat)
    return tree.unflatten(first), tree.unflatten(second)


def outputs(found: dict[str, float]) -> list[float]:
    """Return the distances of the outputs alone."""
    return [error for name, error in found.items() if name not in ("states", "loss", "gradients", "statistics")]
