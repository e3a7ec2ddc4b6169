"""How far two answers lie apart: no torch needed.

An answer of any family, ours or the peer's, is a dict:
    outputs     name -> array, rows first
    states      name -> array, layers first, then rows
    loss        a number
    gradients   of the loss; and in training `statistics`, path -> the next running statistics
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fm_jax.core import tree


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any], insides: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """Return the largest differences of all that the peer's answer has.

    Outputs and states are measured in standard deviations of the peer's, states a layer at a time. `insides` are masks
    [B, T] of real tokens: an array that begins with the axes of one of them is compared where it is true.
    """
    found = {name: _farthest(mine["outputs"][name], want, insides) for name, want in peer["outputs"].items()}
    layers = [
        _farthest(*layer, insides)
        for name, want in peer.get("states", {}).items()
        for layer in zip(mine["states"][name], want, strict=True)
    ]
    if layers:
        found["states"] = max(layers)
    found["loss"] = apart(mine["loss"], peer["loss"])
    if "statistics" in peer:
        assert mine["statistics"].keys() == peer["statistics"].keys()
        found["statistics"] = max(_farthest(mine["statistics"][name], x) for name, x in peer["statistics"].items())
    if "gradients" in peer:
        found["gradients"] = steepest(mine["gradients"], peer["gradients"])
    return found


def _farthest(got: Any, want: Any, insides: Sequence[np.ndarray] = ()) -> float:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, (got.shape, want.shape)
    for inside in insides:
        if want.shape[:2] == inside.shape:
            got, want = got[inside], want[inside]
            break
    return float(np.abs(got - want).max() / want.std())


def apart(mine: Any, peer: float) -> float:
    """Return the difference of two losses, in units of the peer's; in nats where that is below one."""
    return abs(float(mine) - peer) / max(abs(peer), 1.0)


def steepest(mine: Any, peer: Any) -> float:
    """Return the largest difference between the gradients of any parameter, in units of the peer's norm of it.

    One that is nearly zero by rule (a key bias moves every score of a row alike, a layer's scale does nothing before
    another's normalisation) is measured by a hundredth of the whole gradient's norm, since nothing but rounding is
    left of it.
    """
    got, want = tree.flatten(mine), tree.flatten(peer)
    assert got.keys() == want.keys()
    whole = np.sqrt(sum(np.square(gradient).sum() for gradient in want.values()))
    return max(
        float(np.linalg.norm(np.asarray(got[path]) - want[path]) / max(np.linalg.norm(want[path]), 0.01 * whole))
        for path in want
    )
