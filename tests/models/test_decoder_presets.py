"""The decoders that have names: their sizes; what every decoder must do is in test_decoder.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.models.language import decoder
from fm_jax.objectives.language import next_token

PRESETS = {
    # the figures of the released weights
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
}
STATED = {
    # Brown et al. 2020, table 2.1, as rounded there
    "gpt3_small": 125e6, "gpt3_medium": 350e6, "gpt3_large": 760e6, "gpt3_xl": 1.3e9,
    "gpt3_2_7b": 2.7e9, "gpt3_6_7b": 6.7e9, "gpt3_13b": 13e9, "gpt3_175b": 175e9,
}  # fmt: skip


def parameters(cfg):
    boxed = jax.eval_shape(decoder.Decoder(cfg).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return tree.count(meta.unbox(boxed))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset):
    assert parameters(getattr(decoder, preset)()) == PRESETS[preset]


@pytest.mark.parametrize("preset", STATED)
def test_gpt3_presets_have_the_stated_size(preset):
    assert abs(parameters(getattr(decoder, preset)()) / STATED[preset] - 1) < 0.025


@pytest.mark.slow
def test_the_language_model_of_10k_words_starts_at_its_entropy():
    model = decoder.Decoder(decoder.lm10k())
    params = jax.jit(lambda key: meta.unbox(model.init(key, jnp.zeros((1, 4), jnp.int32))["params"]))(jax.random.key(0))
    rows = np.random.default_rng(0).integers(0, 10_000, (2, 64), dtype=np.int32)
    batch = {"tokens": rows, "targets": rows[::-1], "weights": np.ones((2, 64), np.float32)}
    total, weight, _ = jax.jit(next_token(model.apply))(params, batch)
    assert abs(float(total / weight) - math.log(10_000)) < 0.12
