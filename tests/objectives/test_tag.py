import jax
import numpy as np
import pytest

from fm_jax.objectives.tag import replaced, tag
from tests.close import close

B, T, D, C = 3, 5, 4, 6
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(B, T, D)).astype(np.float32),
    "labels": RNG.integers(0, C, (B, T)),
    "weights": (RNG.uniform(size=(B, T)) * (RNG.uniform(size=(B, T)) > 0.4)).astype(np.float32),
}
BATCH["labels"][BATCH["weights"] == 0] = -100  # as other libraries mark them


def apply(variables, x, rngs=None):
    noise = jax.random.normal(rngs["dropout"], x.shape[:2])[..., None] if rngs else 0.0
    return x @ variables["params"]["kernel"] * (1 + noise)


def kernel(width):
    return {"kernel": RNG.normal(size=(D, width)).astype(np.float32)}


def test_the_loss_of_labels_is_the_textbook_one():
    params = kernel(C)
    total, weight, metrics = jax.jit(tag(apply, ("x",)))(params, BATCH)
    logits = (BATCH["x"] @ params["kernel"]).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    asked = np.argwhere(BATCH["weights"] > 0)
    want = -sum(BATCH["weights"][b, t] * log_p[b, t, BATCH["labels"][b, t]] for b, t in asked)
    right = sum(BATCH["weights"][b, t] * (logits[b, t].argmax() == BATCH["labels"][b, t]) for b, t in asked)
    close(total, want)
    close(weight, BATCH["weights"].sum())
    close(metrics["accuracy"][0], right)


def test_the_loss_of_replaced_tokens_is_the_textbook_one():
    params, batch = kernel(1), {**BATCH, "labels": BATCH["labels"] % 2}
    total, weight, metrics = jax.jit(replaced(apply, ("x",)))(params, batch)
    p = 1 / (1 + np.exp(-(batch["x"] @ params["kernel"]).astype(np.float64)[..., 0]))
    want = -(batch["weights"] * np.where(batch["labels"] == 1, np.log(p), np.log(1 - p))).sum()
    close(total, want)
    close(weight, batch["weights"].sum())
    right = (batch["weights"] * ((p > 0.5) == (batch["labels"] == 1))).sum()
    close(metrics["accuracy"][0], right)


@pytest.mark.parametrize(("loss", "width"), [(tag, C), (replaced, 1)])
def test_tokens_without_weight_do_nothing_and_noise_needs_a_key(loss, width):
    loss, params = loss(apply, ("x",)), kernel(width)
    other = {**BATCH, "x": np.where(BATCH["weights"][..., None] > 0, BATCH["x"], 50.0).astype(np.float32)}
    gradient = jax.grad(lambda params, batch: loss(params, batch)[0])
    one, two = (gradient(params, batch)["kernel"] for batch in (BATCH, other))
    close(one, two)
    assert loss(params, BATCH, None)[0] == loss(params, BATCH)[0] != loss(params, BATCH, jax.random.key(0))[0]
