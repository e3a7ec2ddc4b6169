"""What ViTs and MAEs are compared on: images, our numbers, and how far two answers lie apart.

No torch in here: the golden tests read it too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.layers.tap import ENCODER, Tap
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.mae import MAE
from fm_jax.objectives import classify, reconstruct
from tests.parity.gradients import apart, steepest

ROWS, LABELS = 3, 5
KEPT = ("embed", "block.resid_post")


def batch(size: tuple[int, int], channels: int, patch_size: int, width: int) -> dict[str, np.ndarray]:
    """Return images, their labels, a noise for each patch, and a readout [D] of hidden states."""
    rng = np.random.default_rng(1)
    count = size[0] * size[1] // patch_size**2
    return {
        "image": rng.normal(0.2, 1, (ROWS, *size, channels)).astype(np.float32),
        "label": rng.integers(0, LABELS, ROWS).astype(np.int32),
        "noise": rng.permuted(np.tile(np.arange(count), (ROWS, 1)), axis=1).astype(np.float32) / count,
        "readout": rng.normal(size=width).astype(np.float32),
    }


def ours(model: Any, rows: Mapping[str, np.ndarray], *, gradients: bool = True) -> Any:
    """Return a jitted params -> (outputs, states, loss and its gradients) of our model."""
    image, noise = jnp.asarray(rows["image"]), jnp.asarray(rows["noise"])
    if isinstance(model, MAE):
        loss_fn, inputs = reconstruct.masked_patches(model.apply), (image, noise)
    else:
        loss_fn, inputs = classify.softmax(model.apply, ("image",)), (image,)
    fields = {"image": image, "noise": noise, "label": jnp.asarray(rows["label"]), "weights": jnp.ones(ROWS)}
    sides = (ENCODER, "") if isinstance(model, MAE) else ("",)
    tap = Tap(read=tuple(side + site for side in sides for site in KEPT))

    def mean(params: Any) -> jax.Array:
        if isinstance(model, MAE | ImageClassifier):
            total, weight, _ = loss_fn(params, fields, None)
            return total / weight
        return (model.apply({"params": params}, image, method="hidden") @ rows["readout"]).mean()

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        method = "__call__" if isinstance(model, MAE | ImageClassifier) else "hidden"
        out, kept = model.apply({"params": params}, *inputs, tap=tap, mutable=["taps"], method=method)
        read = {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept["taps"])}
        found = {"outputs": {"out": out}}
        for side in sides:
            first, rest = (read[f"site:{side}{site}"] for site in KEPT)
            found["outputs"][f"{side}states"] = jnp.concatenate([first[None], rest])
        if not gradients:
            return found | {"loss": mean(params)}
        loss, slopes = jax.value_and_grad(mean)(params)
        return found | {"loss": loss, "gradients": slopes}

    return compute


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences in units of the peer's standard deviation, a gradient's of its norm.

    Those of states are taken a layer at a time.
    """
    found = {}
    for name, want in peer["outputs"].items():
        got = np.asarray(mine["outputs"][name])
        assert got.shape == want.shape, (name, got.shape, want.shape)
        deviation = want.std(axis=(1, 2, 3), keepdims=True) if want.ndim == 4 else want.std()
        found[name] = float((np.abs(got - want) / deviation).max())
    found["loss"] = apart(mine["loss"], peer["loss"])
    if "gradients" in peer and "gradients" in mine:
        found["gradients"] = steepest(mine["gradients"], peer["gradients"])
    return found
