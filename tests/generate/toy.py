"""Small models that keep the cache contract: a second-order Markov chain of known probabilities, and tiny decoders."""

from dataclasses import dataclass, replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.generate import decode
from fm_jax.layers.cache import init_cache
from fm_jax.models.language import decoder

PADDED = 20  # every sequence is read at this length, so that each model compiles once


@dataclass(frozen=True)
class Config:
    vocab_size: int
    max_length: int = 32


class Markov(nn.Module):
    """The logits after a token are `table[token before it, token]`; with a cache, the token before is read from it."""

    cfg: Config

    def __call__(self, tokens, *, positions=None):
        return self.logits(self.hidden(tokens, positions=positions))

    @nn.compact
    def hidden(self, tokens, *, positions=None):
        size = self.cfg.vocab_size
        table = self.param("table", nn.initializers.normal(1.0), (size, size, size))
        if self.is_mutable_collection("cache") and not self.is_initializing():
            stored = self.variable("cache", "tokens", jnp.zeros, (1, *tokens.shape, 1, 1), jnp.int32)
            rows = jnp.arange(tokens.shape[0])[:, None]
            stored.value = stored.value.at[0, rows, positions, 0, 0].set(tokens)
            before = stored.value[0, rows, jnp.maximum(positions - 1, 0), 0, 0]
            before = jnp.where(positions == 0, 0, before)
        else:
            before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        return table[before, tokens]

    def logits(self, hidden):
        return hidden


def chain(follow: dict[int, int], vocab_size: int) -> tuple[Markov, dict]:
    """A chain in which `follow[t]` comes after t with near certainty, whatever came before."""
    table = np.zeros((vocab_size, vocab_size, vocab_size), np.float32)
    for token, following in follow.items():
        table[:, token, following] = 20.0
    return Markov(Config(vocab_size)), {"table": jnp.asarray(table)}


@cache
def markov(vocab_size: int, seed: int = 0) -> tuple[Markov, dict]:
    model = Markov(Config(vocab_size))
    table = np.random.default_rng(seed).normal(size=(vocab_size,) * 3).astype(np.float32)
    return model, {"table": jnp.asarray(table)}


@cache
def gpt() -> tuple[decoder.Decoder, dict]:
    return initialise(replace(decoder.gpt(2, 16, 2, vocab_size=19, max_length=20), init_std=0.4))


@cache
def llama() -> tuple[decoder.Decoder, dict]:
    """Rotary positions, grouped heads, an untied head, and a window of 3 in every second layer."""
    cfg = decoder.llama(2, 16, 4, 2, 24, vocab_size=19)
    return initialise(replace(cfg, init_std=0.4, attention=replace(cfg.attention, windows=(0, 3))))


def initialise(cfg: decoder.Config) -> tuple[decoder.Decoder, dict]:
    model = decoder.Decoder(cfg)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return model, nn.meta.unbox(variables["params"])


def full(model: nn.Module, params: dict, tokens) -> np.ndarray:
    """The logits [T, V] of one sequence, in one forward pass without a cache."""
    padded = np.zeros((1, PADDED), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model, params, padded)[0, : len(tokens)])


def cached(model: nn.Module, params: dict, texts: np.ndarray, lengths: np.ndarray, context=None):
    """Read texts [B, T] through the cache, first `lengths` [B] tokens at once, then one by one.

    Yields how many of each row were read, and the logits [B, V] after them.
    """
    longest = lengths.max()
    prompts = np.where(np.arange(longest) < lengths[:, None], texts[:, :longest], 7)
    empty = init_cache(model, params, *texts.shape, context)
    logits, kept = jax.jit(partial(decode.prefill, model))(params, empty, prompts, lengths, context)
    step = jax.jit(partial(decode.advance, model))
    for at in (lengths + index for index in range(texts.shape[1] - longest)):
        yield at, logits
        logits, kept = step(params, kept, texts[np.arange(len(texts)), at], at)


@partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    return model.apply({"params": params}, tokens)
