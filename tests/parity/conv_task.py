"""What convolutional classifiers are compared on: images, our numbers, and how far two answers lie apart.

No torch in here: the golden tests read it too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core import statistics, tree
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.objectives.classify import softmax
from tests.parity.gradients import apart, steepest

LABELS, ROWS = 5, 4


def batch(size: tuple[int, int], channels: int = 3) -> dict[str, np.ndarray]:
    """Return images [B, H, W, channels] with slow and fast changes, and their labels."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[: size[0], : size[1]]
    turns = rng.normal(0, 0.3, (2, ROWS, 1, 1, channels))
    waves = np.sin(rows[None, :, :, None] * turns[0] + columns[None, :, :, None] * turns[1])
    image = (waves + rng.normal(0, 0.7, (ROWS, *size, channels))).astype(np.float32)
    label = rng.integers(0, LABELS, ROWS).astype(np.int32)
    return {"image": image, "label": label, "weights": np.ones(ROWS, np.float32)}


def ours(model: Any, rows: Mapping[str, np.ndarray], *, train: bool = False) -> Any:
    """Return a jitted params -> (logits, sites, loss, its gradients, next running statistics) of a classifier."""
    fields = {name: jnp.asarray(field) for name, field in rows.items()}
    loss_fn, rng = softmax(model.apply, ("image",)), jax.random.key(0) if train else None

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        trained, running = statistics.split(params)

        def mean(trained: Any) -> tuple[jax.Array, Any]:
            found = loss_fn(tree.merge(trained, running), fields, rng, None)
            return found.sum / found.weight, found.updates

        (loss, updates), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        moved = {name: value for name, (value, _) in updates.items()}
        if train:
            logits, _ = model.apply({"params": params}, fields["image"], mutable=["statistics"])
            return {"logits": logits, "loss": loss, "gradients": gradients, "statistics": moved}
        logits, sites = capture.apply(model, params, fields["image"], tap=Tap(read=model.sites))
        return {"logits": logits, "sites": sites, "loss": loss, "gradients": gradients}

    return compute


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences in units of the peer's standard deviation; a gradient's of its norm."""
    found = {"logits": _apart(mine["logits"], peer["logits"]), "loss": apart(mine["loss"], peer["loss"])}
    if "sites" in peer:
        assert mine["sites"].keys() == peer["sites"].keys()
        found["sites"] = max(_apart(mine["sites"][name], want) for name, want in peer["sites"].items())
    if "statistics" in peer:
        assert mine["statistics"].keys() == peer["statistics"].keys()
        found["statistics"] = max(_apart(mine["statistics"][name], want) for name, want in peer["statistics"].items())
    if "gradients" in peer:
        found["gradients"] = steepest(mine["gradients"], peer["gradients"])
    return found


def _apart(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / want.std())
