"""Sums over sets: exact under padding, on many devices, and from (trained, frozen)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.types import Loss
from fm_jax.evals import runner
from tests.close import close

PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32), "bias": jnp.zeros(4)}
X = np.random.default_rng(1).normal(size=(23, 3)).astype(np.float32)
Y = np.random.default_rng(2).integers(0, 4, 23).astype(np.int32)


def apply(params, batch):
    return batch["x"] @ params["kernel"] + params["bias"][None]


def loss(params, batch, rng, step):
    assert rng is None and step is None
    logits = apply(params, batch)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
    hits = (logits.argmax(-1) == batch["label"]) * batch["weights"]
    rare = batch["weights"] * (batch["label"] == 3)
    metrics = {"accuracy": (hits.sum(), batch["weights"].sum()), "loss_of_3": ((nll * rare).sum(), rare.sum())}
    return Loss((nll * batch["weights"]).sum(), batch["weights"].sum(), metrics)


STEP = runner.make_eval_step(loss)


def batches(size, x=X, y=Y):
    """Batches of one size; the last is filled up with rows that would spoil any mean they entered."""
    for start in range(0, len(x), size):
        rows = len(x[start : start + size])
        batch = {
            "x": np.full((size, 3), 1e3, np.float32),
            "label": np.zeros(size, np.int32),
            "weights": np.zeros(size, np.float32),
        }
        batch["x"][:rows], batch["label"][:rows], batch["weights"][:rows] = x[start:][:size], y[start:][:size], 1
        yield batch


def wanted():
    logits = X.astype(np.float64) @ np.asarray(PARAMS["kernel"], np.float64)
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(23), Y]
    return {"loss": nll.mean(), "accuracy": np.mean(logits.argmax(1) == Y), "loss_of_3": nll[Y == 3].mean()}


@pytest.mark.parametrize("size", [4, 8, 23])
def test_the_mean_is_over_examples_whatever_the_batches(size):
    close(runner.evaluate(STEP, PARAMS, batches(size)), wanted())


def test_a_mean_of_means_would_be_wrong():
    each = [runner.evaluate(STEP, PARAMS, [batch])["loss"] for batch in batches(8)]
    assert abs(np.mean(each) - wanted()["loss"]) > 1e-3


def test_sums_do_not_lose_small_batches_beside_large_totals():
    def step(params, batch):
        return {"loss": (jnp.float32(batch), jnp.float32(1))}

    # 2²⁴ + 1 is no float32: a sum kept on the device would stay at 2²⁴.
    assert runner.totals(step, None, [2.0**24, *[1.0] * 5]) == {"loss": (2.0**24 + 5, 6.0)}


def test_batches_spread_over_devices_count_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    spread = [jax.device_put(batch, rows) for batch in batches(8)]
    close(runner.evaluate(STEP, params, spread), wanted())
    logits, labels = runner.predict(apply, params, spread)
    close(logits, X @ np.asarray(PARAMS["kernel"]))
    np.testing.assert_array_equal(labels, Y)


def test_trained_and_frozen_parameters_are_combined_inside_the_step():
    parts = tree.partition(PARAMS, ["kernel"])
    step = runner.make_eval_step(loss, combine=tree.merge)
    close(runner.evaluate(step, parts, batches(8)), runner.evaluate(STEP, PARAMS, batches(8)))


def test_the_step_compiles_once_for_all_batches():
    compiled = 0

    def counted(params, batch, rng, step):
        nonlocal compiled
        compiled += 1
        return loss(params, batch, rng, step)

    step = runner.make_eval_step(counted)
    for _ in range(2):
        runner.evaluate(step, PARAMS, batches(8))
    assert compiled == 1


def test_a_metric_that_saw_nothing_is_nan_and_a_loss_that_did_is_an_error():
    common = X[Y != 3][:8], Y[Y != 3][:8]
    assert math.isnan(runner.evaluate(STEP, PARAMS, batches(8, *common))["loss_of_3"])
    padding = {"x": X[:8], "label": Y[:8], "weights": np.zeros(8, np.float32)}
    with pytest.raises(DataError, match="weight 0"):
        runner.evaluate(STEP, PARAMS, [padding])
    with pytest.raises(DataError, match="no batches"):
        runner.evaluate(STEP, PARAMS, [])


def test_a_metric_named_loss_is_refused():
    step = runner.make_eval_step(lambda params, batch, rng, step: Loss(0.0, 1.0, {"loss": (0.0, 1.0)}))
    with pytest.raises(ConfigError, match='"loss"'):
        runner.evaluate(step, PARAMS, batches(8))


@pytest.mark.parametrize("size", [4, 23])
def test_predictions_come_in_order_without_padding(size):
    logits, labels = runner.predict(apply, PARAMS, batches(size))
    assert logits.dtype == np.float32
    close(logits, X @ np.asarray(PARAMS["kernel"]))
    np.testing.assert_array_equal(labels, Y)


def test_predictions_name_what_does_not_fit():
    batch = next(batches(4))
    with pytest.raises(DataError, match="no field 'class'; it has x, label, weights"):
        runner.predict(apply, PARAMS, [batch], label="class")
    with pytest.raises(DataError, match=r"logits \(4,\)"):
        runner.predict(lambda p, b: apply(p, b)[:, 0], PARAMS, [batch])
    with pytest.raises(DataError, match=r"label \(3,\)"):
        runner.predict(apply, PARAMS, [{**batch, "label": batch["label"][:3]}])
    with pytest.raises(DataError, match="no examples"):
        runner.predict(apply, PARAMS, [{**batch, "weights": np.zeros(4)}])
