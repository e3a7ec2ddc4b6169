import jax
import numpy as np

from fm_jax.objectives.embed import in_batch
from tests.close import close

B, D = 5, 8
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.normal(size=(B, D)).astype(np.float32),
    "length": np.ones(B, np.float32),
    "other_tokens": RNG.normal(size=(B, D)).astype(np.float32),
    "other_length": np.ones(B, np.float32),
    "weights": np.array([1, 1, 0.5, 1, 0], np.float32),
}
PARAMS = {"kernel": RNG.normal(size=(D, 6)).astype(np.float32)}


def apply(variables, x, length, rngs=None):
    noise = jax.random.normal(rngs["dropout"], (B, 6)) if rngs else 0.0
    return x @ variables["params"]["kernel"] * length[:, None] + noise


def test_the_loss_ranks_the_partner_among_the_rows_that_count():
    total, weight, metrics = jax.jit(in_batch(apply, scale=7.0))(PARAMS, BATCH)
    one, two = (BATCH[name].astype(np.float64) @ PARAMS["kernel"] for name in ("tokens", "other_tokens"))
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two))
    scores = 7.0 * one[:4] @ two[:4].T  # the fifth row is nobody's negative
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    close(total, -(np.diag(log_p) * BATCH["weights"][:4]).sum())
    assert float(weight) == 3.5
    right = ((scores.argmax(axis=1) == np.arange(4)) * BATCH["weights"][:4]).sum()
    close(metrics["accuracy"][0], right)


def test_what_only_fills_the_batch_does_nothing():
    gradient = jax.grad(lambda params, batch: in_batch(apply)(params, batch)[0])
    other = {**BATCH, "tokens": BATCH["tokens"].copy(), "other_tokens": BATCH["other_tokens"].copy()}
    other["tokens"][4], other["other_tokens"][4] = 0.0, 0.0  # a zero vector too
    one, two = (gradient(PARAMS, batch)["kernel"] for batch in (BATCH, other))
    assert np.isfinite(two).all()
    close(one, two)


def test_the_two_sides_are_dropped_apart_and_with_a_key_only():
    loss, same = in_batch(apply), {**BATCH, "other_tokens": BATCH["tokens"]}
    assert loss(PARAMS, BATCH, None)[0] == loss(PARAMS, BATCH)[0] != loss(PARAMS, BATCH, jax.random.key(0))[0]
    seen = []
    watched = in_batch(lambda *args, rngs=None: seen.append(rngs["dropout"]) or apply(*args, rngs=rngs))
    watched(PARAMS, same, jax.random.key(0))
    assert seen[0] != seen[1]
