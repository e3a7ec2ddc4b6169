from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.models.language import encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.objectives.masked_lm import masked_lm, masking
from fm_jax.train import state as states
from fm_jax.train.step import make_train_step
from tests.close import close

CFG = encoder.tiny()
TOKENS = np.random.default_rng(0).integers(5, 96, (4, 16), dtype=np.int32)


def init(model):
    return jax.jit(lambda key: meta.unbox(model.init(key, TOKENS)["params"]))(jax.random.key(0))


@pytest.mark.parametrize("embed_size", [0, 16])
def test_the_token_table_is_read_backwards(embed_size):
    """Logits are products with the very table, and its gradient is the sum of both uses."""
    model = MaskedLM(encoder.Encoder(replace(CFG, embed_size=embed_size)))
    params = init(model)
    logits = model.apply({"params": params}, TOKENS)
    moved = {**params, "head": {**params["head"], "bias": params["head"]["bias"] + np.arange(96, dtype=np.float32)}}
    close(model.apply({"params": moved}, TOKENS) - logits, np.broadcast_to(np.arange(96.0), logits.shape))
    narrow = np.asarray(params["backbone"]["embed"]["tokens"]).copy()
    narrow[7] = 0
    blank = {**params["backbone"], "embed": {**params["backbone"]["embed"], "tokens": narrow}}
    rows = np.where(TOKENS == 7, 8, TOKENS)
    scores = model.apply({"params": {**params, "backbone": blank}}, rows)
    np.testing.assert_array_equal(scores[..., 7], np.zeros((4, 16)))


def test_logits_of_chosen_states_are_the_logits_there():
    model = MaskedLM(encoder.Encoder(CFG))
    params = init(model)
    hidden = model.apply({"params": params}, TOKENS, method="hidden")
    some = model.apply({"params": params}, hidden[:, [3, 9]], method="logits")
    close(some, model.apply({"params": params}, TOKENS)[:, [3, 9]])


def test_pairs_are_told_by_the_first_token_through_a_pooler():
    model = MaskedLM(encoder.Encoder(CFG), next_sentence=True)
    params = init(model)
    hidden = np.random.default_rng(1).normal(size=(4, 16, 32)).astype(np.float32)
    head = jax.tree.map(np.asarray, params["next"])
    pooled = np.tanh(hidden[:, 0] @ head["hidden"]["kernel"] + head["hidden"]["bias"])
    got = model.apply({"params": params}, hidden, method="pair")
    close(got, pooled @ head["kernel"] + head["bias"])
    with pytest.raises(ConfigError, match="next_sentence=True"):
        MaskedLM(encoder.Encoder(CFG)).apply({"params": params}, hidden, method="pair")


def test_training_learns_what_the_context_tells():
    """Rows repeat one token, so every masked one is known from its neighbours: from ln 91 to almost nothing."""
    rng = np.random.default_rng(0)
    batches = [np.repeat(rng.integers(5, 96, (32, 1)), 12, axis=1).astype(np.int32) for _ in range(8)]
    model = MaskedLM(encoder.Encoder(replace(CFG, dropout=0.0)))
    loss = masked_lm(model.apply, masking(4, 96, (0, 1, 2, 3, 4)))
    tx = optax.adam(3e-3)
    state = states.create(init(model), tx, ema=False)
    step = jax.jit(make_train_step(loss, tx, key=jax.random.key(1)))
    found = []
    for number in range(150):
        tokens = batches[number % 8]
        state, metrics = step(state, {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)})
        found.append(float(metrics["nll"]))
    assert abs(found[0] - np.log(96)) < 0.7
    assert np.mean(found[-10:]) < 1.0
