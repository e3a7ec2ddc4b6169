"""The smallest language model that a step can train: an embedding, a product, noise when there is a key."""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.objectives.language import next_token

V, D, ROWS, TIME = 13, 4, 16, 6


def apply(variables, x, *, method, rngs=None):
    params = variables["params"]
    if method == "logits":
        return x @ params["head"]["kernel"]
    hidden = jnp.tanh(jnp.take(params["embed"], x, axis=0))
    return hidden + 0.5 * jax.random.normal(rngs["dropout"], hidden.shape) if rngs else hidden


noisy = next_token(apply)


def quiet(params, batch, rng):
    """The same loss without noise, whatever the key."""
    return noisy(params, batch, None)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
        "head": {"kernel": jnp.asarray(rng.normal(size=(D, V)), jnp.float32)},
    }


def batch(seed=0, rows=ROWS):
    """Rows of very different lengths, ordered by length so that equal cuts of the batch weigh unequally."""
    rng = np.random.default_rng((1, seed))
    tokens = rng.integers(0, V, (rows, TIME + 1), dtype=np.int32)
    lengths = np.sort(rng.integers(0, TIME + 1, rows))
    weights = (np.arange(TIME) < lengths[:, None]).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def equal(got, want):
    """Compare two trees bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
