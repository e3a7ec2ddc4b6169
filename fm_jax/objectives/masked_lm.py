"""Naming the words taken out of a text; which ones is drawn anew at every step, from the step's own key.

Batch fields: tokens [B, T]; weights [B, T], 1 where a token is real, 0 in padding and in rows that only fill the batch;
segments [B, T] of packed rows (default: a token of weight sees every other); for pairs of texts types [B, T] and
not_next [B] (0: the second text follows the first, 1: it is another); for whole-word masking words [B, T] (the number
of a token's word, the same for its neighbours of the same word only; -1 for special tokens).

Legend: B batch, T time, P places chosen in a row (at most), D d_model, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, Loss, LossFn, Params


class Masked(NamedTuple):
    """A batch with tokens taken out."""

    tokens: jax.Array  # [B, T], what the model reads
    places: jax.Array  # [B, P], which positions are asked for
    targets: jax.Array  # [B, P], what stood there
    weights: jax.Array  # [B, P], 0 where a row has fewer than P


Choose = Callable[[jax.Array, Batch], Masked]


def masking(
    mask_id: int, vocab_size: int, special: tuple[int, ...], *, rate: float = 0.15, whole_word: bool = False
) -> Choose:
    """Make BERT's way of taking tokens out (Devlin et al. 2019, section 3.1).

    Of each row's tokens that have weight and are not special, round(rate · their number) are chosen, at least one; of
    these 80 % become [MASK], 10 % any token of the vocabulary and 10 % stay. The draw depends on the key and on the
    row's own tokens, not on the batch the row stands in: an evaluation is the same in batches of any size.

    Args:
        mask_id: id of [MASK].
        vocab_size: of the ids that a token may be replaced with.
        special: ids that are never chosen.
        rate: share of the tokens to choose.
        whole_word: choose words and take all their tokens; a word that would exceed the number is passed over.
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
            # numbered anew: a pair counts its words twice, and a window of a long text begins anywhere
            words = jnp.cumsum(words != jnp.roll(words, 1)) - 1
            count = jnp.clip(jnp.round(rate * free.sum()).astype(jnp.int32), 1, size)
            pick = _whole_words if whole_word else _single
            chosen = pick(jax.random.uniform(order, tokens.shape), free, words, count)
            kind = jax.random.uniform(kind, tokens.shape)
            other = jax.random.randint(other, tokens.shape, 0, vocab_size, tokens.dtype)
            read = jnp.where(kind < 0.8, jnp.asarray(mask_id, tokens.dtype), jnp.where(kind < 0.9, other, tokens))
            taken, places = jax.lax.top_k(chosen.astype(jnp.int32), size)  # in order: the first of equals comes first
            return Masked(jnp.where(chosen, read, tokens), places, tokens[places], taken.astype(jnp.float32))

        return jax.vmap(row)(tokens, free, words)

    return choose


def masked_lm(apply: Callable[..., Any], choose: Choose) -> LossFn:
    """Make the loss of a `MaskedLM`: named words and, where the batch has `not_next`, the second text's place.

    A row's next-sentence loss weighs as much as P words: in full rows the whole is the sum of the two means, as BERT's
    (but for rounding P up), and unlike that sum it is exact under accumulation.

    Args:
        apply: `model.apply`, with the methods "hidden", "logits" and "pair".
        choose: what is taken out, `masking(…)`; without a key (evaluation) it is given a fixed one.

    Returns:
        LossFn whose metrics are "nll" (of the words, in nats) and "accuracy", both per place, and for pairs
        "next_nll" and "next_accuracy" per row.
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
    """Return the weighted sums of negative log-likelihood and of right answers; logits [..., C], the others [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    correct = (picked >= logits.max(axis=-1)).astype(jnp.float32)
    return (nll * weights).sum(), (correct * weights).sum()


def _fingerprint(tokens: jax.Array) -> jax.Array:
    """Return a number [] that differs between rows: a polynomial of their ids, modulo 2³²."""
    powers = jnp.cumprod(jnp.full(tokens.shape, 0x9E3779B1, jnp.uint32))  # odd, so that no power vanishes
    return (tokens.astype(jnp.uint32) * powers).sum()


def _single(noise: jax.Array, free: jax.Array, words: jax.Array, count: jax.Array) -> jax.Array:
    """Choose `count` of the free tokens: those of the smallest noise. All [T]; `words` plays no part."""
    rank = jnp.argsort(jnp.argsort(jnp.where(free, noise, 2.0)))
    return free & (rank < count)


def _whole_words(noise: jax.Array, free: jax.Array, words: jax.Array, count: jax.Array) -> jax.Array:
    """Choose words in the order of their noise, each that still fits into `count` tokens. All [T]."""
    time = words.shape[0]
    sizes = jnp.zeros(time, jnp.int32).at[words].add(free.astype(jnp.int32), mode="drop")
    order = jnp.argsort(noise)  # of the word numbers; one noise a word

    def fit(left: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        taken = (size > 0) & (size <= left)
        return left - taken * size, taken

    _, taken = jax.lax.scan(fit, count, sizes[order])
    return free & jnp.zeros(time, bool).at[order].set(taken)[words]
