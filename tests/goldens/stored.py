"""The files beside this: what torch computed once on tiny models. Numpy alone reads and writes them.

For each case a file holds
  CASE/peer        JSON: the transformers config, [name, shape] of every tensor in the order below, and more;
  CASE/weights     all tensors end to end, in float16;
  CASE/gradients   float32: every fifth or so number of the mean loss's gradient, tensors end to end;
and whatever else the NAME.py beside it says.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core import tree
from fm_jax.core.types import Params
from tests.parity import convert

EVERY = 5  # one in so many of a gradient's numbers is stored


class Golden:
    """A file, and its cases in our terms."""

    def __init__(self, name: str, *, every: int = EVERY) -> None:
        self.file, self.every = Path(__file__).with_name(f"{name}.npz"), every

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Return what the file holds. It is read only when asked for: `make.py` may be about to write it."""
        with np.load(self.file) as stored:
            return dict(stored)

    @cached_property
    def peers(self) -> dict[str, dict[str, Any]]:
        """Return each case's JSON."""
        return {
            name.removesuffix("/peer"): json.loads(str(array))
            for name, array in sorted(self.arrays.items())
            if name.endswith("/peer")
        }

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Return what stands below a name, without that name."""
        start = f"{prefix}/"
        return {name.removeprefix(start): array for name, array in self.arrays.items() if name.startswith(start)}

    def named(self, case: str, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Cut a flat vector into the peer's tensors."""
        found, start = {}, 0
        for name, shape in self.peers[case]["tensors"]:
            found[name] = flat[start : start + np.prod(shape, dtype=int)].reshape(shape)
            start += found[name].size
        assert start == flat.size
        return found

    def numbered(self, case: str) -> dict[str, np.ndarray]:
        """Return tensors of the case's names and shapes, every number its place in the flat vector."""
        return self.named(case, np.arange(self.arrays[f"{case}/weights"].size, dtype=np.float32))

    def load(self, case: str) -> tuple[nn.Module, Params, Params]:
        """Return our module, our parameters, and for each of their numbers its place in the peer's flat vector."""
        module = convert.module(self.peers[case]["config"])
        weights = self.named(case, self.arrays[f"{case}/weights"].astype(np.float32))
        return module, convert.params(module, weights), convert.params(module, self.numbered(case))

    def steepest(self, where: str, gradients: Params, places: Params) -> float:
        """Return how far our gradients are from `where`/gradients, as a share of the norm of what is stored."""
        want = self.arrays[f"{where}/gradients"]
        got, places = np.zeros_like(want), tree.flatten(places)
        for path, leaf in tree.flatten(gradients).items():
            place = np.asarray(places[path]).astype(int).ravel()
            kept = place % self.every == 0
            got[place[kept] // self.every] = np.asarray(leaf).ravel()[kept]
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def entry(
    case: str,
    config: Any,
    weights: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    every: int = EVERY,
    **told: Any,
) -> dict[str, np.ndarray]:
    """Return what every case holds, of a transformers config and of tensors by name; `told` is for the JSON."""
    names = sorted(weights)
    numbers = flat(weights, names)
    if (numbers != numbers.astype(np.float16)).any():
        raise ValueError(f"{case}: weights that float16 cannot hold")
    config = json.loads(json.dumps(config.to_dict(), default=str))
    tensors = [(name, weights[name].shape) for name in names]
    return {
        f"{case}/peer": np.array(json.dumps({"config": config, **told, "tensors": tensors})),
        f"{case}/weights": numbers.astype(np.float16),
        f"{case}/gradients": flat(gradients, names)[::every],
    }


def flat(tensors: Mapping[str, np.ndarray], names: Iterable[str]) -> np.ndarray:
    """Return tensors end to end."""
    return np.concatenate([tensors[name].ravel() for name in names])
