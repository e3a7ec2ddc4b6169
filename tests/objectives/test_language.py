import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.objectives.language import next_token
from tests.close import close

B, T, D, V = 3, 8, 4, 11
RNG = np.random.default_rng(0)
PARAMS = {"table": RNG.normal(size=(V, D)).astype(np.float32), "head": RNG.normal(size=(D, V)).astype(np.float32)}
BATCH = {
    "tokens": RNG.integers(0, V, (B, T)),
    "targets": RNG.integers(0, V, (B, T)),
    "weights": (RNG.uniform(size=(B, T)) * (RNG.uniform(size=(B, T)) > 0.3)).astype(np.float32),
}


def apply(variables, x, *, method, rngs=None, **where):
    """A model of two matrices; noise when there is a key, and an offset by position to see it is passed on."""
    params = variables["params"]
    if method == "logits":
        return x @ params["head"]
    hidden = jnp.take(params["table"], x, axis=0)
    if rngs:
        hidden = hidden + jax.random.normal(rngs["dropout"], hidden.shape)
    return hidden + sum(field[..., None].astype(jnp.float32) for field in where.values())


def oracle(batch=BATCH, z_loss=0.0, label_smoothing=0.0):
    logits = (PARAMS["table"][batch["tokens"]] @ PARAMS["head"]).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.eye(V)[batch["targets"]] * (1 - label_smoothing) + label_smoothing / V
    per_token = -(target * (logits - log_z[..., None])).sum(-1) + z_loss * log_z**2
    return (per_token * batch["weights"]).sum(), logits


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.2}])
@pytest.mark.parametrize("chunk", [0, 5])
def test_the_loss_is_the_textbook_one(options, chunk):
    total, weight, metrics = jax.jit(next_token(apply, chunk=chunk, **options))(PARAMS, BATCH)
    want, logits = oracle(**options)
    close(total, want)
    close(weight, BATCH["weights"].sum())
    plain = oracle()[0]
    right = (logits.argmax(-1) == BATCH["targets"]) * BATCH["weights"]
    close(metrics["nll"][0], plain)
    close(metrics["accuracy"][0], right.sum())
    assert right.sum() > 0
    assert all(part == weight for _, part in metrics.values())


@pytest.mark.parametrize("chunk", [1, 5, 7, 8, 24, 100])
def test_chunks_change_neither_the_loss_nor_a_gradient(chunk):
    """24 tokens, in sizes that divide them and sizes that do not."""

    def run(chunk):
        loss = next_token(apply, chunk=chunk, z_loss=0.1, label_smoothing=0.1)
        return jax.jit(jax.value_and_grad(lambda params: loss(params, BATCH, jax.random.key(0))[0]))(PARAMS)

    (value, gradient), (want, wanted) = run(chunk), run(0)
    close(value, want)
    close(gradient, wanted)


def largest(jaxpr):
    """Return the most elements that any value of a program holds, inner programs included."""
    found = [np.prod(variable.aval.shape) for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found.append(largest(inner))
    return max(found, default=0)


def test_chunked_logits_never_exist_all_at_once():
    """Neither in the traced program, forward and backward, nor in the memory that the compiler plans."""
    tokens, vocab = 1024, 2048
    params = {"table": jnp.zeros((vocab, D)), "head": jnp.zeros((D, vocab))}
    batch = {"tokens": jnp.zeros((4, 256), int), "targets": jnp.zeros((4, 256), int), "weights": jnp.ones((4, 256))}
    elements, scratch = {}, {}
    for chunk in (0, 64):
        loss = next_token(apply, chunk=chunk)
        gradient = jax.jit(jax.grad(lambda params, loss=loss: loss(params, batch)[0]))
        elements[chunk] = largest(jax.make_jaxpr(gradient)(params).jaxpr)
        scratch[chunk] = gradient.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert elements[0] == tokens * vocab  # the measures see it where it is
    assert scratch[0] > 4 * tokens * vocab
    assert elements[64] == 64 * vocab
    assert scratch[64] < 4 * tokens * vocab / 4


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_batch_of_padding_has_no_loss_and_no_gradient(chunk):
    empty = {**BATCH, "weights": np.zeros((B, T), np.float32)}
    loss = next_token(apply, chunk=chunk)
    (total, weight), gradient = jax.value_and_grad(lambda params: loss(params, empty)[:2], has_aux=True)(PARAMS)
    assert total == weight == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_noise_comes_with_a_key_only():
    loss = next_token(apply)
    still, noisy = loss(PARAMS, BATCH, None)[0], loss(PARAMS, BATCH, jax.random.key(1))[0]
    assert still == loss(PARAMS, BATCH)[0]
    close(still, oracle()[0])
    assert abs(still - noisy) > 1e-3


def test_positions_and_segments_reach_the_model():
    plain = next_token(apply)(PARAMS, BATCH)[0]
    for name in ("positions", "segments"):
        placed = next_token(apply)(PARAMS, {**BATCH, name: np.ones((B, T), np.int32)})[0]
        assert abs(placed - plain) > 1e-3
