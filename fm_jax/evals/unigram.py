"""What is reached without reading: every token by its frequency alone, the commonest as the answer."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.core.types import Batch
from fm_jax.evals import metrics, runner


def count(parts: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """Return log frequencies [V] of the tokens in arrays of any shape, each counted once more than it was seen.

    Raises:
        DataError: no token.
    """
    found = np.zeros(vocab_size, np.int64)
    for part in parts:
        found += np.bincount(np.asarray(part).reshape(-1), minlength=vocab_size)
    if not found.any():
        raise DataError("there is no token to count")
    return np.log((found + 1) / (found.sum() + vocab_size)).astype(np.float32)


def measure(
    log_p: np.ndarray, asked: Callable[[Batch], tuple[jax.Array, jax.Array]], batches: Iterable[Batch]
) -> dict[str, float]:
    """Return "unigram_perplexity" and "unigram_accuracy" over finitely many batches.

    Args:
        log_p: from `count`.
        asked: batch -> (tokens, weights) of one shape: what a model is asked for.
        batches: every batch once.
    """

    def step(log_p: jax.Array, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        tokens, weights = asked(batch)
        right = (tokens == log_p.argmax()).astype(jnp.float32)
        return {
            "nll": (-(log_p[tokens] * weights).sum(), weights.sum()),
            "right": ((right * weights).sum(), weights.sum()),
        }

    sums = runner.totals(jax.jit(step), jnp.asarray(log_p), batches)
    return {
        "unigram_perplexity": metrics.perplexity(*sums["nll"]),
        "unigram_accuracy": sums["right"][0] / sums["right"][1],
    }
