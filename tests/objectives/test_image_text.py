"""CLIP's and SigLIP's losses against oracles by pairs, with padding rows, and on eight devices as on one."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core import sharding
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.objectives import image_text
from tests.close import close

B, D, P = 8, 5, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "image": RNG.normal(size=(D, P)).astype(np.float32), "text": RNG.normal(size=(D, P)).astype(np.float32),
    "scale": np.float32(1.2), "bias": np.float32(-0.7),
}  # fmt: skip
BATCH = {
    "image": RNG.normal(size=(B, D)).astype(np.float32),
    "tokens": RNG.normal(size=(B, D)).astype(np.float32),
    "weights": np.array([1, 0.5, 1, 0, 1, 2, 0, 1], np.float32),
}
BATCH["tokens"][:4] = BATCH["image"][:4] @ PARAMS["image"] @ np.linalg.pinv(PARAMS["text"])  # some pairs are near
KINDS = {"softmax": image_text.softmax, "sigmoid": image_text.sigmoid}


def towers(variables, image, tokens, rngs=None, mutable=()):
    """Two linear towers, in the form of the real model's answer."""
    p = variables["params"]
    first, second = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image @ p["image"], tokens @ p["text"]))
    out = SimpleNamespace(image=first, text=second, scale=jnp.exp(p["scale"]), bias=p["bias"])
    return (out, {}) if mutable else out


def oracle(kind):
    """Return (sum, metrics) by going through all pairs, one at a time."""
    first, second = (BATCH[x].astype(np.float64) @ PARAMS[y] for x, y in (("image", "image"), ("tokens", "text")))
    weights, scale = BATCH["weights"].astype(float), math.exp(PARAMS["scale"])
    kept = [row for row in range(B) if weights[row] > 0]

    def cosine(i, j):
        return first[i] @ second[j] / math.sqrt((first[i] @ first[i]) * (second[j] @ second[j]))

    logit = {(i, j): cosine(i, j) * scale + float(PARAMS["bias"]) for i in kept for j in kept}
    total, sums = 0.0, dict.fromkeys(("image_accuracy", "similarity", "scale"), 0.0)
    for i in kept:
        if kind == "softmax":
            sides = [[logit[i, j] for j in kept], [logit[j, i] for j in kept]]
            total += weights[i] * sum(math.log(sum(map(math.exp, side))) - logit[i, i] for side in sides) / 2
        else:
            total += weights[i] * sum(math.log(1 + math.exp(logit[i, j] * (-1 if i == j else 1))) for j in kept)
        sums["image_accuracy"] += weights[i] * (max(kept, key=lambda j, i=i: logit[i, j]) == i)
        sums["similarity"] += weights[i] * cosine(i, i)
        sums["scale"] += weights[i] * scale
    return total, sums


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_an_oracle_by_pairs(kind):
    total, weight, metrics, _ = jax.jit(KINDS[kind](towers))(PARAMS, BATCH)
    want, sums = oracle(kind)
    close(total, want)
    assert float(weight) == BATCH["weights"].sum()
    for name, value in sums.items():
        close(metrics[name][0], value)
    assert 0 < sums["image_accuracy"] < float(weight)
    halves = ("image_nll", "text_nll") if kind == "softmax" else ("own_nll", "other_nll")
    whole = sum(float(metrics[name][0]) for name in halves)
    close(whole / 2 if kind == "softmax" else whole, want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_fills_the_batch_does_nothing(kind):
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: KINDS[kind](towers)(params, batch).sum))
    kept = BATCH["weights"] > 0
    other = {name: np.where(kept[:, None], BATCH[name], 1.0) for name in ("image", "tokens")}
    for batch in ({**BATCH, **other}, {name: value[kept] for name, value in BATCH.items()}):
        close(gradient(PARAMS, batch), gradient(PARAMS, BATCH), scale=10.0)
    assert float(KINDS[kind](towers)(PARAMS, {**BATCH, "weights": np.zeros(B, np.float32)}).sum) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_compute_the_loss_and_gradient_of_one(kind):
    """With one pair a device there would be no negatives at all if they were not gathered."""
    step = jax.jit(jax.value_and_grad(lambda params, batch: KINDS[kind](towers)(params, batch).sum))
    alone = step(PARAMS, BATCH)
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        many = step(PARAMS, jax.device_put(BATCH, sharding.batch_sharding(mesh)))
    close(many, alone, scale=10.0)  # of the largest gradients
    own = sum(float(KINDS[kind](towers)(PARAMS, {k: x[i : i + 1] for k, x in BATCH.items()}).sum) for i in range(B))
    assert abs(own - float(alone[0])) > 1  # what it would be without


def test_a_caption_that_stands_several_times_puts_a_floor_under_the_loss():
    """n equal captions share the probability of each of their images: at best ln n."""
    vectors = jnp.eye(4)[jnp.array([0, 0, 0, 1])]
    out = SimpleNamespace(image=vectors, text=vectors, scale=jnp.float32(100), bias=jnp.float32(0))
    batch = {"image": vectors, "tokens": vectors, "weights": jnp.ones(4)}
    total, *_ = image_text.softmax(lambda *_: out)({}, batch)
    close(total, 3 * math.log(3))
