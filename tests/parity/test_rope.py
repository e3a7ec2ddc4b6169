"""Texts that are generated past the length of the original training, step by step beside transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fm_jax.generate.decode import advance, prefill
from fm_jax.layers.cache import init_cache
from tests.close import close, small
from tests.parity import convert
from tests.parity.language import llama

ORIGINAL, LONGEST = 16, 24
TOLERANCE = llama.TOLERANCE  # of the peer's standard deviation


def peer(case):
    """Return a fresh peer: a dynamic one remembers the longest text that it has read."""
    return llama.peer(case).requires_grad_(False)


def module(case):
    model = convert.module(peer(case).config.to_dict())
    return model, convert.params(model, llama.tensors(peer(case)))


def stepwise(case, tokens, start):
    """Return the peer's logits after each token from `start` on: a prompt at once, then one token after the other."""
    model, logits = peer(case), []
    given = torch.from_numpy(tokens[None].astype(np.int64))
    out = model(given[:, :start], use_cache=True)
    for time in range(start, len(tokens)):
        logits.append(out.logits[0, -1].numpy())
        out = model(given[:, time : time + 1], past_key_values=out.past_key_values, use_cache=True)
    return np.stack([*logits, out.logits[0, -1].numpy()])


@pytest.mark.parametrize("case", ["llama-dynamic", "llama-longrope"])
@pytest.mark.parametrize("start", [10, ORIGINAL, 19])
def test_keys_in_the_cache_keep_the_angles_they_were_written_with(case, start):
    """A prompt that ends before, at or beyond the original length; two rows, compared with each alone."""
    model, params = module(case)
    rows = np.random.default_rng(0).integers(0, llama.VOCAB, (2, LONGEST), dtype=np.int32)
    want = np.stack([stepwise(case, row, start) for row in rows], axis=1)
    cache = init_cache(model, params, 2, LONGEST)
    logits, cache = prefill(model, params, cache, jnp.asarray(rows[:, :start]), jnp.array([start, start]))
    got, step = [logits], jax.jit(lambda cache, tokens, places: advance(model, params, cache, tokens, places))
    for time in range(start, LONGEST):
        logits, cache = step(cache, rows[:, time], jnp.array([time, time]))
        got.append(logits)
    close(np.stack(got), want, TOLERANCE, scale=want.std())


@pytest.mark.parametrize("case", ["llama-dynamic", "llama-longrope"])
def test_the_same_text_read_at_once_differs_in_both(case):
    model, params = module(case)
    tokens = np.random.default_rng(0).integers(0, llama.VOCAB, LONGEST, dtype=np.int32)
    whole = np.asarray(model.apply({"params": params}, tokens[None]))[0, -1]
    theirs = peer(case)(torch.from_numpy(tokens[None].astype(np.int64)), use_cache=False).logits[0, -1].numpy()
    small(np.abs(whole - theirs).max() / theirs.std(), TOLERANCE)
    assert np.abs(whole - stepwise(case, tokens, 10)[-1]).max() / theirs.std() > 100 * TOLERANCE
