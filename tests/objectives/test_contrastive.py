"""NT-Xent against an oracle by pairs, full and filled up, on one device and on eight, whole and in parts."""

import math
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core import sharding, statistics, tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.vision import resnet
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.objectives.contrastive import nt_xent
from fm_jax.train import state
from fm_jax.train.step import make_train_step
from tests.close import close

B, D, P, TEMPERATURE = 6, 5, 4, 0.3
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(D, P)).astype(np.float32)}
BATCH = {
    "image_a": RNG.normal(size=(B, D)).astype(np.float32),
    "image_b": RNG.normal(size=(B, D)).astype(np.float32),
    "weights": np.ones(B, np.float32),
}


def linear(variables, x, rngs=None, mutable=()):
    out = x @ variables["params"]["kernel"]
    return (out, {}) if mutable else out


LOSS = nt_xent(linear, temperature=TEMPERATURE)


def oracle(batch, kernel):
    """Return the four numbers by going through all pairs of views, one at a time."""
    views = [(image, side) for image in range(B) for side in "ab" if batch["weights"][image] > 0]
    vector = {view: batch[f"image_{view[1]}"][view[0]].astype(np.float64) @ kernel for view in views}
    sums = dict.fromkeys(("loss", "accuracy", "entropy", "similarity", "weight"), 0.0)
    for image, side in views:
        anchor, cosine = vector[image, side], {}
        for other in views:
            if other != (image, side):
                both = math.sqrt(sum(anchor**2)) * math.sqrt(sum(vector[other] ** 2))
                cosine[other] = sum(anchor * vector[other]) / both
        whole = sum(math.exp(value / TEMPERATURE) for value in cosine.values())
        chance = {other: math.exp(value / TEMPERATURE) / whole for other, value in cosine.items()}
        partner, weight = (image, "ba"["ab".index(side)]), float(batch["weights"][image])
        sums["loss"] -= weight * math.log(chance[partner])
        sums["accuracy"] += weight * (max(chance, key=chance.get) == partner)
        sums["entropy"] -= weight * sum(p * math.log(p) for p in chance.values())
        sums["similarity"] += weight * cosine[partner]
        sums["weight"] += weight
    return sums


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1, 1), (1, 0.5, 1, 0, 1, 0)])
def test_every_number_is_that_of_an_oracle_by_pairs(weights):
    # views that resemble each other, so that the accuracy is neither 0 nor 1
    near = BATCH["image_a"] + 0.7 * BATCH["image_b"]
    batch = {**BATCH, "image_b": near, "weights": np.array(weights, np.float32)}
    total, weight, metrics, _ = jax.jit(LOSS)(PARAMS, batch)
    want = oracle(batch, PARAMS["kernel"].astype(np.float64))
    assert float(weight) == want["weight"] == 2 * sum(weights)
    close(total, want["loss"])
    assert metrics.keys() == {"accuracy", "entropy", "similarity"}
    assert 0 < want["accuracy"] < want["weight"]
    for name, (summed, part) in metrics.items():
        close(summed, want[name])
        assert float(part) == want["weight"]


def test_what_only_fills_the_batch_does_nothing():
    weights = np.array([1, 1, 0, 1, 1, 0], np.float32)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: LOSS(params, batch)[0]))
    one = {**BATCH, "weights": weights}
    other = {name: np.where(weights[:, None] > 0, one[name], 0.0) for name in ("image_a", "image_b")}
    short = {name: value[weights > 0] for name, value in one.items()}
    for batch in (one | other, short):
        close(gradient(PARAMS, batch), gradient(PARAMS, one))
    total, weight, *_ = LOSS(PARAMS, {**BATCH, "weights": np.zeros(B, np.float32)})
    assert float(total) == float(weight) == 0


def test_the_length_of_a_projection_and_the_order_of_the_views_do_not_matter():
    swapped = {**BATCH, "image_a": BATCH["image_b"], "image_b": BATCH["image_a"]}
    longer = {"kernel": 7 * PARAMS["kernel"]}
    for params, batch in ((PARAMS, swapped), (longer, BATCH)):
        close(LOSS(params, batch)[0], LOSS(PARAMS, BATCH)[0])


def test_views_that_agree_and_images_that_differ_cost_nothing_when_it_is_cold():
    images = np.eye(B, dtype=np.float32)
    batch = {"image_a": images, "image_b": 2 * images, "weights": np.ones(B, np.float32)}
    total, weight, metrics, _ = nt_xent(linear, temperature=0.01)({"kernel": images}, batch)
    close(total, 0.0, scale=float(weight) / 0.01)  # logits of 1 / 0.01 cancel
    close(metrics["similarity"][0], weight)
    assert float(metrics["accuracy"][0]) == float(weight)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_cannot_be_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        nt_xent(linear, temperature=temperature)


# a network with batch normalisation, through the real step

ROWS = 16
MODEL = SimCLR(resnet.ResNet(resnet.tiny()), out=8)
IMAGES = RNG.normal(size=(2, ROWS, 8, 8, 3)).astype(np.float32)
VIEWS = {"image_a": IMAGES[0], "image_b": IMAGES[0] + 0.5 * IMAGES[1], "weights": np.ones(ROWS, np.float32)}
VIEWS["weights"][[3, 14]] = 0
RATE, KEY = 0.5, jax.random.key(0)


def network():
    params = jax.jit(lambda key: meta.unbox(MODEL.init(key, IMAGES[0])["params"]))(KEY)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + rng.uniform(0.02, 0.1, leaf.shape).astype(np.float32), params)
    return statistics.split(moved)


def stepped(mesh, batch, accumulate=1):
    """Return (loss and metrics, trained, running statistics) after one step of gradient descent."""
    tx, (trained, running) = optax.sgd(RATE), network()
    create = partial(_create, tx)
    place = sharding.shardings(jax.eval_shape(MODEL.init, KEY, IMAGES[0])["params"], mesh)
    halves = statistics.split(place)
    begun = state.place(create, jax.device_put(trained, halves[0]), jax.device_put(running, halves[1]), mesh)
    step = make_train_step(nt_xent(MODEL.apply, temperature=0.5), tx, key=KEY, accumulate=accumulate)
    with jax.set_mesh(mesh):
        done, metrics = jax.jit(step)(begun, jax.device_put(batch, sharding.batch_sharding(mesh)))
    return metrics, done.params, done.frozen


def _create(tx, params, frozen):
    return state.create(params, tx, frozen=frozen, ema=False)


@pytest.fixture(scope="module")
def alone():
    return stepped(make_mesh(MeshConfig(data=1), jax.devices()[:1]), VIEWS)


@pytest.mark.parametrize("cfg", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_eight_devices_compute_the_loss_gradient_and_statistics_of_one(cfg, alone):
    """Negatives and moments are those of all devices: with 2 images a device there are 27 candidates, not 3."""
    got = stepped(make_mesh(cfg), VIEWS)
    for one, two in zip(got, alone, strict=True):
        close(one, two, 5e-5)
    before, after = (tree.flatten(params) for params in (network()[0], alone[1]))
    moved = {path: np.abs(after[path] - leaf).max() for path, leaf in before.items()}
    assert min(moved.values()) > 3e-5  # every leaf was stepped by more than the devices may differ by
    assert float(alone[0]["loss"]) > math.log(4)  # as no loss over three candidates is at random


def test_negatives_of_ones_own_device_would_be_another_loss(alone):
    """What the test above would see if the negatives were not gathered."""
    params = tree.merge(*network())
    loss = nt_xent(MODEL.apply, temperature=0.5)
    own = [loss(params, {name: x[k : k + 2] for name, x in VIEWS.items()}, KEY)[:2] for k in range(0, ROWS, 2)]
    total, weight = (float(sum(values)) for values in zip(*own, strict=True))
    assert abs(total / weight - float(alone[0]["loss"])) > 0.5


def test_accumulation_compares_a_view_with_those_of_its_own_part():
    """The step deals rows out in turn; each part is a batch by itself, negatives and moments alike."""
    metrics, _, running = stepped(make_mesh(MeshConfig(data=1), jax.devices()[:1]), VIEWS, accumulate=2)
    loss, params = jax.jit(nt_xent(MODEL.apply, temperature=0.5)), tree.merge(*network())
    parts = [loss(params, {name: x[k::2] for name, x in VIEWS.items()}, KEY) for k in range(2)]
    total, weight = (sum(part[k] for part in parts) for k in range(2))
    close(metrics["loss"], total / weight)
    for path, leaf in tree.flatten(running).items():
        close(leaf, sum(part.updates[path][0] for part in parts) / 2)
