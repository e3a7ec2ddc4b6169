"""Masked-language-model loss, with dynamic masking: every step masks other tokens, drawn from the step's key.

Batch fields: tokens [B, T]; weights [B, T], 1 for real tokens, 0 for padding and padding rows; segments [B, T] of
packed rows (default: all real tokens of a row attend to each other); for pairs of texts types [B, T] and not_next [B]
(0: the second text follows the first, 1: it is a random one); for whole-word masking words [B, T] (the number of a
token's word, equal only for adjacent tokens of the same word; -1 for special tokens).

Legend: B batch, T time, P most positions masked in a row, D d_model, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, Loss, LossFn, Params


class Masked(NamedTuple):
    """A masked batch."""

    tokens: jax.Array  # [B, T], the model's input
    places: jax.Array  # [B, P], masked positions
    targets: jax.Array  # [B, P], their original tokens
    weights: jax.Array  # [B, P], 0 for unused positions


Choose = Callable[[jax.Array, Batch], Masked]


def masking(
    mask_id: int, vocab_size: int, special: tuple[int, ...], *, rate: float = 0.15, whole_word: bool = False
) -> Choose:
    """Make BERT's masking function (Devlin et al. 2019, section 3.1).

    In each row, round(rate · n) of the n tokens that have weight and are not special are chosen, at least one; 80 % of
    these become [MASK], 10 % a random token of the vocabulary, and 10 % stay. The choice depends on the key and on the
    row's own tokens, not on the rest of the batch: an evaluation gives the same numbers for every batch size.

    Args:
        mask_id: id of [MASK].
        vocab_size: random replacements have ids below this.
        special: ids that are never chosen.
        rate: share of the tokens to choose.
        whole_word: choose whole words, with all their tokens; words that would exceed the number are skipped.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"the rate of masked tokens must be in (0, 1), not {rate}")
    if not 0 <= mask_id < vocab_size:
        raise ConfigError(f"mask_id {mask_id} must be below vocab_size {vocab_size}")

    def choose(key: jax.Array, batch: Batch) -> Masked:
        tokens, weights = batch["tokens"], batch["weights"]
        free = (weights > 0) & ~jnp.isin(tokens, jnp.asarray(special, tokens.dtype))
        words = batch["words"] if whole_word else jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        size = max(1, math.ceil(rate * tokens.shape[1]))

        def row(tokens: jax.Array, free: jax.Array, words: jax.Array) -> Masked:
            order, kind, other = jax.random.split(jax.random.fold_in(key, _fingerprint(tokens)), 3)
            free = free & (words >= 0)
            # renumber: both texts of a pair count their words from 0, and a window of a long text starts anywhere
            words = jnp.cumsum(words != jnp.roll(words, 1)) - 1
            count = jnp.clip(jnp.round(rate * free.sum()).astype(jnp.int32), 1, size)
            pick = _whole_words if whole_word else _single
            chosen = pick(jax.random.uniform(order, tokens.shape), free, words, count)
            kind = jax.random.uniform(kind, tokens.shape)
            other = jax.random.randint(other, tokens.shape, 0, vocab_size, tokens.dtype)
            read = jnp.where(kind < 0.8, jnp.asarray(mask_id, tokens.dtype), jnp.where(kind < 0.9, other, tokens))
            taken, places = jax.lax.top_k(chosen.astype(jnp.int32), size)  # stable: ties keep their order
            return Masked(jnp.where(chosen, read, tokens), places, tokens[places], taken.astype(jnp.float32))

        return jax.vmap(row)(tokens, free, words)

    return choose


def masked_lm(apply: Callable[..., Any], choose: Choose) -> LossFn:
    """Make the loss of a `MaskedLM`: masked tokens and, if the batch has `not_next`, next-sentence prediction.

    A row's next-sentence loss has the weight of P tokens: for full rows the total is the sum of the two means, as in
    BERT (except that P is rounded up), but unlike that sum it is exact under accumulation.

    Args:
        apply: `model.apply`, with the methods "hidden", "logits" and "pair".
        choose: masking function, from `masking(…)`; without a key (evaluation) it gets a fixed one.

    Returns:
        LossFn with the metrics "nll" (in nats) and "accuracy", both per masked token, and for pairs "next_nll" and
        "next_accuracy" per row.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None = None, step: jax.Array | None = None) -> Loss:
        key, noise = (jax.random.key(0), None) if rng is None else jax.random.split(rng)
        rngs = None if noise is None else {"dropout": noise}
        masked = choose(key, batch)
        real = batch["weights"] > 0
        where = {name: batch[name] for name in ("types", "positions") if name in batch}
        segments = batch["segments"] if "segments" in batch else real.astype(jnp.int32)
        variables = {"params": params}
        hidden = apply(variables, masked.tokens, segments=segments, **where, rngs=rngs, method="hidden")
        gathered = jnp.take_along_axis(hidden, masked.places[..., None], axis=1)
        logits = apply(variables, gathered, method="logits")
        nll, correct = _score(logits, masked.targets, masked.weights)
        weight = masked.weights.sum()
        metrics = {"nll": (nll, weight), "accuracy": (correct, weight)}
        if "not_next" not in batch:
            return Loss(nll, weight, metrics)
        rows = real.any(axis=1).astype(jnp.float32)
        pair = apply(variables, hidden, rngs=rngs, method="pair")
        next_nll, next_correct = _score(pair, batch["not_next"], rows)
        metrics |= {"next_nll": (next_nll, rows.sum()), "next_accuracy": (next_correct, rows.sum())}
        return Loss(nll + masked.places.shape[1] * next_nll, weight, metrics)

    return loss


def _score(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sums of negative log-likelihood and accuracy; logits [..., C], the others [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    correct = (picked >= logits.max(axis=-1)).astype(jnp.float32)
    return (nll * weights).sum(), (correct * weights).sum()


def _fingerprint(tokens: jax.Array) -> jax.Array:
    """Return a hash [] of a row [T]: a polynomial of its ids, modulo 2³²."""
    powers = jnp.cumprod(jnp.full(tokens.shape, 0x9E3779B1, jnp.uint32))  # odd, so that no power vanishes
    return (tokens.astype(jnp.uint32) * powers).sum()


def _single(noise: jax.Array, free: jax.Array, words: jax.Array, count: jax.Array) -> jax.Array:
    """Choose the `count` free tokens with the smallest noise. All arrays [T]; `words` is not used."""
    rank = jnp.argsort(jnp.argsort(jnp.where(free, noise, 2.0)))
    return free & (rank < count)


def _whole_words(noise: jax.Array, free: jax.Array, words: jax.Array, count: jax.Array) -> jax.Array:
    """Choose words in the order of their noise, each one that still fits into `count` tokens. All arrays [T]."""
    time = words.shape[0]
    sizes = jnp.zeros(time, jnp.int32).at[words].add(free.astype(jnp.int32), mode="drop")
    order = jnp.argsort(noise)  # one noise value per word number

    def fit(left: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        taken = (size > 0) & (size <= left)
        return left - taken * size, taken

    _, taken = jax.lax.scan(fit, count, sizes[order])
    return free & jnp.zeros(time, bool).at[order].set(taken)[words]
