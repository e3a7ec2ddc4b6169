from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core import sharding
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.language import decoder
from fm_jax.objectives.language import next_token
from fm_jax.train import replicated, state
from fm_jax.train.step import make_train_step
from tests.close import close
from tests.train import toy

KEY = jax.random.key(7)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))


def whole(state):
    """Check that every device holds the same and return one copy."""
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], state)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pmap_and_jit_compute_the_same_steps(accumulate):
    options = {"key": KEY, "ema_decay": 0.9, "accumulate": accumulate}
    begun = state.create(toy.params(), TX, ema=True)
    mapped = replicated.make_replicated_step(toy.quiet, TX, **options)
    jitted = jax.jit(make_train_step(toy.quiet, TX, **options))
    mesh = make_mesh(MeshConfig())
    one, many = jax.device_put(begun, sharding.replicated(mesh)), replicated.replicate(begun)
    for seed in range(3):
        batch = toy.batch(seed, rows=32)
        many, same = mapped(many, batch)
        with jax.set_mesh(mesh):
            one, metrics = jitted(one, jax.device_put(batch, sharding.batch_sharding(mesh)))
        close(same, metrics)
    close(whole(many), one)


def test_a_bad_number_on_one_device_stops_the_step_on_all():
    begun = replicated.replicate(state.create(toy.params(), TX, ema=True))
    before = jax.tree.map(np.asarray, begun)
    poisoned = toy.batch()
    poisoned["weights"][-1, 0] = np.nan
    after, metrics = replicated.make_replicated_step(toy.quiet, TX, key=KEY)(begun, poisoned)
    toy.equal((after.params, after.opt_state, after.ema), (before.params, before.opt_state, before.ema))
    assert metrics["skip"] and (after.skipped == 1).all()


def test_each_device_draws_its_own_noise():
    begun = replicated.replicate(state.create(toy.params(), TX, ema=False))
    rows = toy.batch(rows=2)
    same = {name: np.tile(field, (8, *(1,) * (field.ndim - 1))) for name, field in rows.items()}
    _, metrics = replicated.make_replicated_step(toy.noisy, TX, key=KEY)(begun, same)
    rngs = [jax.random.fold_in(jax.random.fold_in(KEY, 0), device) for device in range(8)]
    sums = [toy.noisy(toy.params(), rows, rng) for rng in rngs]
    assert np.std([total for total, _, _ in sums]) > 1e-2
    want = sum(total for total, _, _ in sums) / sum(weight for _, weight, _ in sums)
    close(metrics["loss"], want)


def test_a_decoder_runs_under_pmap_as_it_is():
    """Its sharding constraints must not name axes that pmap does not have."""
    model = decoder.Decoder(replace(decoder.tiny(), num_layers=1))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (8, 9), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 8), np.float32)}
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch["tokens"]))["params"]
    total, weight, _ = jax.jit(next_token(model.apply))(params, batch)
    tx = optax.sgd(0.1)
    begun = replicated.replicate(state.create(params, tx, ema=False))
    after, metrics = replicated.make_replicated_step(next_token(model.apply), tx, key=KEY)(begun, batch)
    close(metrics["loss"], total / weight)
    assert np.abs(whole(after).params["embed"]["tokens"] - params["embed"]["tokens"]).max() > 0
    assert jnp.isfinite(metrics["grad_norm"])
