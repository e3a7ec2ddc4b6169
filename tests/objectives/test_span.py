import jax
import numpy as np

from fm_jax.objectives.span import span
from tests.close import close

B, T, D = 6, 9, 4
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(D, 2)).astype(np.float32)}
BATCH = {
    "x": RNG.normal(size=(B, T, D)).astype(np.float32),
    "length": np.array([9, 9, 7, 5, 9, 9]),
    "start": np.array([0, 3, 2, 6, -1, 4]),  # the fourth is in the padding, the fifth not in this window
    "end": np.array([2, 8, 6, 4, 2, 5]),
    "weights": np.array([1, 0.5, 2, 1, 1, 0], np.float32),
}
INPUTS = ("x", "length")


def apply(variables, x, length, rngs=None):
    noise = jax.random.normal(rngs["dropout"], (B, T)) if rngs else 0.0
    logits = x @ variables["params"]["kernel"]
    real = np.arange(T)[None] < length[:, None]
    return tuple(jax.numpy.where(real, logits[..., side] + noise, -1e30) for side in (0, 1))


def test_the_loss_is_the_textbook_one_and_ends_out_of_range_are_passed_over():
    total, weight, metrics = jax.jit(span(apply, INPUTS))(PARAMS, BATCH)
    logits = (BATCH["x"] @ PARAMS["kernel"]).astype(np.float64)
    sums, counted, right = 0.0, 0.0, 0.0
    for row in range(B):
        length, w, hit = BATCH["length"][row], BATCH["weights"][row], True
        for side, name in enumerate(("start", "end")):
            scores, place = logits[row, :length, side], BATCH[name][row]
            if 0 <= place < length:
                sums += 0.5 * w * (np.log(np.exp(scores).sum()) - scores[place])
                counted += 0.5 * w
            hit &= place == scores.argmax()
        right += w * hit
    close(total, sums)
    assert float(weight) == counted == 4.5  # 5.5 but for half of each of the two rows
    assert float(metrics["exact"][0]) == right
    assert metrics["exact"][1] == BATCH["weights"].sum()


def test_a_span_that_is_found_is_exact():
    scores = {name: np.full((B, T), -3.0, np.float32) for name in ("start", "end")}
    for name, table in scores.items():
        table[np.arange(B), np.clip(BATCH[name], 0, None)] = 5.0
    found = span(lambda variables, x, length, rngs=None: (scores["start"], scores["end"]), INPUTS)
    assert found({}, BATCH)[2]["exact"][0] == 3.5  # the first three rows: the others' spans are not in their windows
    scores["end"][1, :] = 0.0
    assert found({}, BATCH)[2]["exact"][0] == 3.0


def test_rows_that_only_fill_the_batch_do_nothing_and_noise_needs_a_key():
    loss = span(apply, INPUTS)
    other = {**BATCH, "x": BATCH["x"].copy()}
    other["x"][5] = 100.0
    gradient = jax.grad(lambda params, batch: loss(params, batch)[0])
    np.testing.assert_array_equal(gradient(PARAMS, BATCH)["kernel"], gradient(PARAMS, other)["kernel"])
    assert np.isfinite(gradient(PARAMS, BATCH)["kernel"]).all()
    assert loss(PARAMS, BATCH, None)[0] == loss(PARAMS, BATCH)[0] != loss(PARAMS, BATCH, jax.random.key(0))[0]
