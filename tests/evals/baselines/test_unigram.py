import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.baselines import unigram
from tests.close import close


def test_frequencies_are_counted_and_every_token_has_one() -> None:
    found = unigram.count([np.array([[0, 2], [2, 2]]), np.array([1])], 4)
    close(np.exp(found), np.array([2, 2, 4, 1]) / 9)
    with pytest.raises(DataError, match="no token"):
        unigram.count([], 4)


def test_what_is_asked_is_scored_by_its_weight_over_all_batches() -> None:
    log_p = np.log(np.array([2, 2, 4, 1], np.float32) / 9)
    batches = [{"t": jnp.array([[2, 3]]), "w": jnp.array([[1.0, 1.0]])}, {"t": jnp.array([[0, 2]]), "w": jnp.eye(1, 2)}]
    found = unigram.measure(log_p, lambda batch: (batch["t"], batch["w"]), batches)
    close(found["unigram_perplexity"], (4 / 9 * 1 / 9 * 2 / 9) ** (-1 / 3))
    close(found["unigram_accuracy"], 1 / 3)
