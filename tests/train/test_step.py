from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core import sharding, statistics
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.core.types import Loss
from fm_jax.layers.batch_norm import BatchNorm
from fm_jax.models.language import decoder
from fm_jax.objectives.classify import softmax
from fm_jax.objectives.language import next_token
from fm_jax.optim import optimizer, schedule
from fm_jax.train import state
from fm_jax.train.step import make_train_step
from tests.close import close
from tests.train import toy

KEY = jax.random.key(7)
ROWS = 16
ADAM = optax.adamw(0.1)


def begin(tx=ADAM, ema=True, frozen=None, params=None):
    return state.create(toy.params() if params is None else params, tx, frozen=frozen, ema=ema)


def stepper(loss_fn=toy.quiet, tx=ADAM, **options):
    return jax.jit(make_train_step(loss_fn, tx, key=KEY, **{"ema_decay": 0.9, **options}))


def test_a_step_is_the_weighted_mean_gradient_given_to_the_optimiser():
    batch, begun = toy.batch(), begin(optax.sgd(0.5))

    def mean(params):
        total, weight, *_ = toy.quiet(params, batch, None)
        return total / weight

    loss, gradient = jax.value_and_grad(mean)(begun.params)
    done, metrics = stepper(tx=optax.sgd(0.5))(begun, batch)
    close(done.params, jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, begun.params, gradient))
    close(metrics["loss"], loss)
    close(metrics["nll"], loss)
    close(metrics["grad_norm"], optax.tree.norm(gradient))
    assert int(done.step) == 1 and int(done.skipped) == 0 and not metrics["skip"]


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulation_is_the_large_batch_however_full_its_parts(parts):
    batch = toy.batch()
    # adam's first step is the sign of the gradient alone: with sgd a wrong scale is seen too
    whole, metrics = stepper(tx=optax.sgd(0.5))(begin(optax.sgd(0.5)), batch)
    apart, summed = stepper(tx=optax.sgd(0.5), accumulate=parts)(begin(optax.sgd(0.5)), batch)
    close(apart, whole)
    close(summed, metrics)


def test_a_mean_of_means_is_not_the_mean():
    """What the step does not do; else the test above could not tell."""
    batch, begun = toy.batch(), begin()
    pieces = [{name: field[part::4] for name, field in batch.items()} for part in range(4)]

    def mean(params, batch):
        total, weight, *_ = toy.quiet(params, batch, None)
        return total / weight

    exact = jax.grad(mean)(begun.params, batch)
    means = [jax.grad(mean)(begun.params, piece) for piece in pieces]
    averaged = jax.tree.map(lambda *leaves: sum(leaves) / 4, *means)
    assert (
        max(np.abs(one - two).max() for one, two in zip(*map(jax.tree.leaves, (exact, averaged)), strict=True)) > 1e-3
    )


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ConfigError, match="16 rows cannot be accumulated in 3 equal parts"):
        stepper(accumulate=3)(begin(), toy.batch())


def test_every_device_gets_its_share_of_every_part():
    """Accumulation must not move rows between devices: part i of [B] is every parts-th row."""
    mesh = make_mesh(MeshConfig(data=8))
    batch = jax.device_put(toy.batch(), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = stepper(accumulate=2).lower(jax.device_put(begin(), sharding.replicated(mesh)), batch).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-to-all" not in text and "all-gather" not in text and "collective-permute" not in text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_number_changes_nothing_but_the_counters(bad, accumulate):
    step = stepper(accumulate=accumulate)
    once, _ = step(begin(), toy.batch())
    poisoned = toy.batch(1)
    poisoned["weights"][3, 2] = bad
    twice, metrics = step(once, poisoned)
    toy.equal((twice.params, twice.opt_state, twice.ema), (once.params, once.opt_state, once.ema))
    assert int(twice.step) == 2 and int(twice.skipped) == 1
    assert metrics["skip"] and int(metrics["skipped"]) == 1
    again, metrics = step(twice, poisoned)
    assert int(again.skipped) == int(metrics["skipped"]) == 2
    healed, metrics = step(again, toy.batch(2))
    assert int(healed.skipped) == 0 and not metrics["skip"] and int(healed.step) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(healed))
    assert np.abs(healed.params["embed"] - once.params["embed"]).max() > 0


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    def steep(params, batch, rng, step):
        return Loss(jnp.sqrt(jnp.abs(params["embed"] - toy.params()["embed"])).sum(), jnp.ones(()), {})

    done, metrics = stepper(steep)(begin(), toy.batch())
    assert float(metrics["loss"]) == 0 and metrics["skip"]
    toy.equal(done.params, toy.params())


def test_the_mean_of_the_parameters_follows_them():
    step, now, want = stepper(ema_decay=0.9), begin(), toy.params()
    for seed in range(3):
        now, _ = step(now, toy.batch(seed))
        want = jax.tree.map(lambda mean, leaf: 0.9 * mean + 0.1 * leaf, want, now.params)
        close(now.ema, want)
    assert stepper()(begin(ema=False), toy.batch())[0].ema is None


def test_frozen_leaves_stay_and_cost_the_optimiser_nothing():
    whole = toy.params()
    trained, frozen = {"head": whole["head"]}, {"embed": whole["embed"]}
    begun = begin(params=trained, frozen=frozen)
    assert {leaf.shape for leaf in jax.tree.leaves(begun.opt_state)} == {(), (toy.D, toy.V)}
    done, metrics = stepper()(begun, toy.batch())
    toy.equal(done.frozen, frozen)
    everything, _ = stepper()(begin(), toy.batch())
    close(done.params["head"], everything.params["head"])
    assert float(metrics["grad_norm"]) > 0


def test_frozen_leaves_combine_as_they_are_told():
    begun = begin(params={"delta": jnp.zeros((toy.V, toy.D))}, frozen=toy.params(), ema=False)
    combine = lambda trained, frozen: {**frozen, "embed": frozen["embed"] + trained["delta"]}  # noqa: E731
    done, _ = stepper(combine=combine)(begun, toy.batch())
    everything, _ = stepper(tx=optax.adam(0.1))(begin(optax.adam(0.1)), toy.batch())
    adam, _ = stepper(tx=optax.adam(0.1), combine=combine)(
        begin(optax.adam(0.1), params=begun.params, frozen=begun.frozen, ema=False), toy.batch()
    )
    close(toy.params()["embed"] + adam.params["delta"], everything.params["embed"])
    assert np.abs(done.params["delta"]).max() > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_of_padding_only_gives_a_gradient_of_zero(accumulate):
    empty = {**toy.batch(), "weights": np.zeros((toy.ROWS, toy.TIME), np.float32)}
    tx = optax.sgd(0.5)
    done, metrics = stepper(tx=tx, accumulate=accumulate)(begin(tx), empty)
    toy.equal(done.params, toy.params())
    assert float(metrics["grad_norm"]) == float(metrics["loss"]) == 0 and not metrics["skip"]


def test_noise_is_a_function_of_the_key_and_the_step():
    step, begun, batch = stepper(toy.noisy), begin(), toy.batch()
    one, again = step(begun, batch), step(begun, batch)
    toy.equal(one[0], again[0])
    later = step(begun.replace(step=jnp.asarray(5)), batch)
    assert abs(float(one[1]["loss"] - later[1]["loss"])) > 1e-3
    total, weight, *_ = toy.noisy(begun.params, batch, jax.random.fold_in(KEY, 5))
    close(later[1]["loss"], total / weight)


def test_each_part_of_an_accumulated_step_has_its_own_noise():
    """Two parts of the same rows: the same noise for both would give the loss of one."""
    rows = toy.batch(rows=8)
    twice = {name: np.repeat(field, 2, axis=0) for name, field in rows.items()}
    _, metrics = stepper(toy.noisy, accumulate=2)(begin(), twice)
    rngs = [jax.random.fold_in(jax.random.fold_in(KEY, 0), part) for part in range(2)]
    sums = [toy.noisy(toy.params(), rows, rng) for rng in rngs]
    assert abs(float(sums[0][0] - sums[1][0])) > 1e-2
    want = sum(one.sum for one in sums) / sum(one.weight for one in sums)
    close(metrics["loss"], want)


MESHES = [MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)]


@pytest.mark.parametrize("cfg", MESHES, ids=["fsdp", "mixed"])
def test_a_step_on_a_mesh_keeps_every_layout_and_computes_the_same(cfg, whole_run):
    """The state's layout is a fixed point, so that the second step compiles nothing and donation holds."""
    states, losses = train(cfg)
    close(losses, whole_run[1], 5e-5)
    for one, two in zip(jax.tree.leaves(states[-1].params), jax.tree.leaves(whole_run[0][-1].params), strict=True):
        close(one, two, 1e-5, scale=1.0)
    for after in states[1:]:
        leaves = zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(after), strict=True)
        for (path, old), new in leaves:
            assert old.sharding.is_equivalent_to(new.sharding, old.ndim), path
            assert old.dtype == new.dtype and old.weak_type == new.weak_type, path


@pytest.fixture(scope="module")
def whole_run():
    return train(MeshConfig(data=1), jax.devices()[:1])


def train(cfg, devices=None):
    """Return the states and losses of three accumulated, clipped AdamW steps of a decoder with a mean."""
    mesh = make_mesh(cfg, devices)
    model = decoder.Decoder(replace(decoder.tiny(), num_layers=1, remat="full"))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (16, 17), dtype=np.int32)
    weights = (np.arange(16) < rng.integers(1, 17, 16)[:, None]).astype(np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    params = state.init_params(model, [batch["tokens"]], jax.random.key(0), mesh)
    plan = schedule.make(schedule.Config(kind="constant", peak=1e-3, num_steps=10, warmup_steps=0))
    # with AdamW's own eps a gradient that is rounding alone would move its leaf as far as any other
    tx = optimizer.make(optimizer.Config(eps=1e-3), plan, params)
    now = state.place(partial(_create, tx), params, {}, mesh)
    step = make_train_step(next_token(model.apply, chunk=64), tx, key=KEY, accumulate=2, ema_decay=0.9)
    with jax.set_mesh(mesh):
        step = jax.jit(step)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        states, losses = [now], []
        for _ in range(3):
            now, metrics = step(now, batch)
            states.append(now)
            losses.append(metrics["loss"])
    return states, losses


def _create(tx, params, frozen):
    return state.create(params, tx, frozen=frozen, ema=True)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(BatchNorm(name="norm")(x))


def labelled():
    rng = np.random.default_rng(3)
    image = rng.normal(2.0, 1.5, (ROWS, 5)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 3, ROWS), "weights": np.ones(ROWS, np.float32)}


NORMED = softmax(Normed().apply, ("image",))


def normed(batch):
    return meta.unbox(Normed().init(jax.random.key(0), batch["image"]))["params"]


@pytest.mark.parametrize("parts", [1, 4])
def test_running_statistics_move_in_the_frozen_leaves_and_are_not_logged(parts):
    batch = labelled()
    trained, running = statistics.split(normed(batch))
    done, metrics = stepper(NORMED, accumulate=parts)(begin(frozen=running, params=trained), batch)
    pieces = batch["image"].reshape(ROWS // parts, parts, 5)
    close(done.frozen["norm"], {"mean": 0.1 * batch["image"].mean(0), "var": 0.9 + 0.1 * pieces.var(0, ddof=1).mean(0)})
    assert not [name for name in metrics if "norm/" in name]


def test_a_step_with_bad_numbers_leaves_running_statistics_alone():
    batch = labelled()
    trained, running = statistics.split(normed(batch))
    bad = {**batch, "image": np.where(np.arange(ROWS)[:, None] == 3, np.nan, batch["image"]).astype(np.float32)}
    done, metrics = stepper(NORMED)(begin(frozen=running, params=trained), bad)
    assert metrics["skip"]
    toy.equal(done.frozen, running)


def test_updates_of_trained_leaves_and_of_none_are_refused_by_name():
    batch = labelled()
    with pytest.raises(ConfigError, match=r"updates \['norm/mean', 'norm/var'\].* trained leaves: freeze them first"):
        stepper(NORMED)(begin(params=normed(batch)), batch)

    def astray(params, batch, rng, step):
        return toy.noisy(params, batch, None)._replace(updates={"codebook/usage": (jnp.ones(3), jnp.ones(()))})

    with pytest.raises(
        ConfigError, match=r"\['codebook/usage'\].* not leaves of the state; the frozen leaves are other"
    ):
        stepper(astray, combine=lambda trained, _: trained)(begin(frozen={"other": jnp.zeros(3)}), toy.batch())


def test_a_loss_sees_the_number_of_its_step_in_every_part():
    """As a temperature that follows a schedule; the whole step has one number, however many parts it has."""

    def scheduled(params, batch, rng, step):
        loss = toy.noisy(params, batch, None)
        return loss._replace(metrics={"temperature": (loss.weight * 2.0 / (1 + step), loss.weight)})

    for parts in (1, 4):
        step = stepper(scheduled, accumulate=parts)
        first, metrics = step(begin(), toy.batch())
        close(metrics["temperature"], 2.0)
        close(step(first, toy.batch(1))[1]["temperature"], 1.0)


@pytest.mark.parametrize("parts", [1, 4])
def test_updates_are_means_by_their_own_weights(parts):
    """As the use of a codebook: each part's sum and weight add up, and one division makes the leaf's next value."""

    def counting(params, batch, rng, step):
        loss = toy.noisy(params, batch, None)
        used = jax.nn.one_hot(batch["tokens"], toy.V) * batch["weights"][..., None]
        return loss._replace(updates={"usage": (used.sum((0, 1)), batch["weights"].sum())})

    batch = toy.batch()
    combine = lambda trained, frozen: trained  # noqa: E731
    done, metrics = stepper(counting, accumulate=parts, combine=combine)(
        begin(frozen={"usage": jnp.zeros(toy.V), "other": jnp.ones(2)}), batch
    )
    counts = np.bincount(batch["tokens"][batch["weights"] > 0], minlength=toy.V)
    close(done.frozen, {"usage": jnp.asarray(counts / counts.sum(), jnp.float32), "other": jnp.ones(2)})
    assert "usage" not in metrics
