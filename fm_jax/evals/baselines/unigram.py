"""Unigram baseline: perplexity and accuracy from token frequencies alone."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.core.types import Batch
from fm_jax.evals import metrics, runner


def count(parts: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """Return log probabilities float32 [V] of the tokens in arrays of any shape, with add-one smoothing.

    Raises:
        DataError: there are no tokens.
    """
    counts = np.zeros(vocab_size, np.int64)
    for part in parts:
        counts += np.bincount(np.asarray(part).reshape(-1), minlength=vocab_size)
    if not counts.any():
        raise DataError("there are no tokens to count; check that the split is not empty")
    return np.log((counts + 1) / (counts.sum() + vocab_size)).astype(np.float32)


def measure(
    log_p: np.ndarray, asked: Callable[[Batch], tuple[jax.Array, jax.Array]], batches: Iterable[Batch]
) -> dict[str, float]:
    """Return "unigram_perplexity" and "unigram_accuracy" over finitely many batches.

    Args:
        log_p: the log probabilities [V] of `count`.
        asked: batch -> (tokens, weights) of one shape: the targets of a model.
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
