"""Running statistics through losses and steps: split off, averaged over parts of a batch, put into the state."""

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta

from fm_jax.core import statistics, tree
from fm_jax.layers.batch_norm import BatchNorm
from fm_jax.objectives.classify import softmax
from tests.close import close

B, D, C = 8, 5, 3
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(2.0, 1.5, (B, D)).astype(np.float32),
    "label": RNG.integers(0, C, B),
    "weights": np.ones(B, np.float32),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(C, name="head")(BatchNorm(name="norm")(x))


PARAMS = meta.unbox(Net().init(jax.random.key(0), BATCH["image"]))["params"]
LOSS = softmax(Net().apply, ("image",))


def test_the_split_takes_the_running_moments_and_nothing_else():
    trained, running = statistics.split(PARAMS)
    assert set(tree.flatten(running)) == {"norm/mean", "norm/var"}
    assert set(tree.flatten(trained)) == {"norm/scale", "norm/bias", "head/kernel", "head/bias"}


def test_a_training_loss_carries_the_next_moments_and_evaluation_none():
    loss = LOSS(PARAMS, BATCH, jax.random.key(1))
    assert loss.updates.keys() == {"norm/mean", "norm/var"} and loss.metrics.keys() == {"nll", "accuracy"}
    total, weight = loss.updates["norm/mean"]
    close(total / weight, 0.1 * BATCH["image"].mean(0))
    assert LOSS(PARAMS, BATCH, None).updates == {}


def test_the_mean_over_parts_is_what_their_sums_give():
    parts = [{name: field[k::2] for name, field in BATCH.items()} for k in range(2)]
    pairs = [LOSS(PARAMS, part, jax.random.key(1)).updates["norm/var"] for part in parts]
    total, weight = (sum(values) for values in zip(*pairs, strict=True))
    wanted = np.mean([0.9 + 0.1 * part["image"].var(0, ddof=1) for part in parts], axis=0)
    close(total / weight, wanted)
