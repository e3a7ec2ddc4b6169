"""How far two losses or gradients lie apart: no torch needed."""

from typing import Any

import numpy as np

from fm_jax.core import tree


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
