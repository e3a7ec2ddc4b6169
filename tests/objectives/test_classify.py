import jax
import numpy as np
import pytest

from fm_jax.objectives.classify import softmax
from tests.close import close

B, D, C = 6, 3, 5
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(D, C)).astype(np.float32)}
BATCH = {
    "image": RNG.normal(size=(B, D)).astype(np.float32),
    "label": RNG.integers(0, C, B),
    "weights": np.array([1, 1, 0.5, 2, 0, 0], np.float32),
}


def apply(variables, image, rngs=None, mutable=None):
    noise = jax.random.normal(rngs["dropout"], (B, C)) if rngs else 0.0
    logits = image @ variables["params"]["kernel"] + noise
    return (logits, {}) if mutable else logits


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_the_textbook_one(label_smoothing):
    total, weight, metrics = softmax(apply, ("image",), label_smoothing=label_smoothing)(PARAMS, BATCH, None)
    logits = BATCH["image"] @ PARAMS["kernel"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(C)[BATCH["label"]]
    smooth = target * (1 - label_smoothing) + label_smoothing / C
    close(total, (-(smooth * log_p).sum(-1) * BATCH["weights"]).sum())
    close(metrics["nll"][0], (-(target * log_p).sum(-1) * BATCH["weights"]).sum())
    right = (logits.argmax(-1) == BATCH["label"]) * BATCH["weights"]
    close(metrics["accuracy"][0], right.sum())
    assert weight == metrics["nll"][1] == metrics["accuracy"][1] == 4.5


def test_rows_that_only_fill_the_batch_do_nothing():
    loss = softmax(apply, ("image",))
    other = {**BATCH, "image": BATCH["image"].copy()}
    other["image"][4:] = 1e3
    gradient = jax.grad(lambda params, batch: loss(params, batch, None)[0])
    np.testing.assert_array_equal(gradient(PARAMS, BATCH)["kernel"], gradient(PARAMS, other)["kernel"])


def test_noise_comes_with_a_key_only():
    loss = softmax(apply, ("image",))
    assert loss(PARAMS, BATCH, None)[0] == loss(PARAMS, BATCH)[0] != loss(PARAMS, BATCH, jax.random.key(0))[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_soft_target_is_the_mixture_of_its_hard_ones(label_smoothing):
    loss = softmax(apply, ("image",), label_smoothing=label_smoothing)
    other = RNG.permutation(BATCH["label"])
    share = np.linspace(0.5, 1, B, dtype=np.float32)
    target = share[:, None] * np.eye(C, dtype=np.float32)[BATCH["label"]]
    target = target + (1 - share[:, None]) * np.eye(C, dtype=np.float32)[other]
    total, weight, metrics = loss(PARAMS, {**BATCH, "target": target}, None)
    parts = [
        loss(PARAMS, {**BATCH, "label": label, "weights": BATCH["weights"] * part}, None)[0]
        for label, part in ((BATCH["label"], share), (other, 1 - share))
    ]
    close(total, sum(parts))
    assert weight == 4.5
    assert metrics["accuracy"][0] == loss(PARAMS, BATCH, None)[2]["accuracy"][0]
    hard = {**BATCH, "target": np.eye(C, dtype=np.float32)[BATCH["label"]]}
    close(loss(PARAMS, hard, None)[0], loss(PARAMS, BATCH, None)[0])
