"""What this project does in a turn of `detectors`: a detector's predictions, or its training step."""

import statistics as numbers
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._sides import Prepared, resident_gb
from fm_jax.core import host_memory, statistics
from fm_jax.hub import pretrained
from fm_jax.models.vision.yolox import STRIDES, Raw, detect
from fm_jax.objectives.detection import yolox as objective
from fm_jax.ops import anchor_points
from fm_jax.optim import optimizer as optimizers
from fm_jax.train import state as states
from fm_jax.train.step import make_train_step

SHOWN = 64  # predictions that the sides compare
_SUPPRESSIONS = 5  # runs of non-maximum suppression, of which the median is told


def infer(folder: str, batch: str, *, cache: str | None = None) -> Prepared:
    """Prepare the decoded predictions of a batch of images, before non-maximum suppression.

    Args:
        folder: the checkpoint.
        batch: file with the fields of a batch.
        cache: folder of compiled programs, None for none.
    """
    _begin(cache)
    loaded = pretrained.load(folder)
    with np.load(batch) as stored:
        images = jnp.asarray(stored["images"])
    size = (images.shape[1], images.shape[2])

    def predict(params: Any, images: jax.Array) -> tuple[Raw, jax.Array]:
        raw: Raw = loaded.module.apply({"params": params}, images)
        return raw, decoded(raw, size)

    run = jax.jit(predict)

    def turn() -> dict[str, Any]:
        jax.block_until_ready(run(loaded.params, images)[1])
        return {}

    raw, found = run(loaded.params, images)
    turn()
    told = {"predictions": shown(np.asarray(found)), "nms_s": _seconds(jax.jit(lambda raw: detect(raw, size)), raw)}
    return told | {"resident_gb": resident_gb()}, turn


def decoded(raw: Raw, size: tuple[int, int]) -> jax.Array:
    """Return centre and sides in pixels, objectness and classes' probabilities: [B, A, 5 + C], the peer's form."""
    low, high = jnp.split(anchor_points.decode(raw.boxes, anchor_points.points(*size, STRIDES)), 2, axis=-1)
    sure = jax.nn.sigmoid(jnp.concatenate([raw.objectness[..., None], raw.classes], axis=-1))
    return jnp.concatenate([(low + high) / 2, high - low, sure], axis=-1)


def shown(found: np.ndarray) -> list[float]:
    """Return evenly spaced ones of all predicted numbers."""
    flat = found.reshape(-1)
    return [float(value) for value in flat[np.arange(SHOWN) * len(flat) // SHOWN]]


def train(folder: str, batch: str, *, learning_rate: float, cache: str | None = None) -> Prepared:
    """Prepare a training step: forward and backward pass, assignment, SGD with Nesterov momentum.

    Args:
        folder: the checkpoint.
        batch: file with the fields of a batch.
        learning_rate: of SGD.
        cache: folder of compiled programs, None for none.
    """
    _begin(cache)
    loaded = pretrained.load(folder)
    trained, frozen = statistics.split(loaded.params)
    cfg = optimizers.Config(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, clip_norm=None)
    tx = optimizers.make(cfg, learning_rate, trained)
    run = jax.jit(make_train_step(objective.yolox(loaded.module.apply), tx, key=jax.random.key(0)), donate_argnums=0)
    held = [states.create(trained, tx, frozen=frozen, ema=False)]
    with np.load(batch) as stored:
        fields = {name: jnp.asarray(stored[name]) for name in stored}

    def step() -> float:
        held[0], metrics = run(held[0], fields)
        return float(metrics["loss"])

    loss = step()
    for _ in range(2):
        step()
    return {"loss": loss, "resident_gb": resident_gb()}, lambda: {"loss": step()}


def _seconds(run: Callable[[Raw], Any], raw: Raw) -> float:
    jax.block_until_ready(run(raw))
    times = []
    for _ in range(_SUPPRESSIONS):
        started = time.perf_counter()
        jax.block_until_ready(run(raw))
        times.append(time.perf_counter() - started)
    return round(numbers.median(times), 5)


def _begin(cache: str | None) -> None:
    """Keep freed memory, and compiled programs in this folder, as the commands of this project do (`cli.main`)."""
    host_memory.keep_freed()
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
