import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.checkpoint import read
from fm_jax.checkpoint.store import Store, load_meta, load_params
from fm_jax.core.errors import CheckpointError
from tests.checkpoint.states import assert_same, make, shapes, spread


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "checkpoints", meta={"config": {"d_model": 16}}) as opened:
        yield opened


def test_restore_onto_any_mesh(store):
    state = make(1, ema=True)
    store.save(1, spread(state, 8), {})
    store.wait()
    for devices in (8, 4, 1):
        wanted = shapes(spread(state, devices))
        restored, _ = store.restore(1, wanted)
        assert_same(restored, state)
        assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == [w.sharding for w in jax.tree.leaves(wanted)]
    assert {
        leaf.sharding.num_devices
        for leaf in jax.tree.leaves(store.restore(1, jax.eval_shape(lambda: make(1, ema=True)))[0])
    } == {1}


def test_another_model_is_refused_leaf_by_leaf(store):
    state = make(0)
    store.save(1, state, {})
    wanted = shapes(state)
    cases = {
        "params/head/kernel: stored bfloat16[16,8], wanted float32[16,8]": wanted.replace(
            params={**wanted.params, "head": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
        ),
        "params/head/kernel: stored bfloat16[16,8], wanted bfloat16[8,16]": wanted.replace(
            params={**wanted.params, "head": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}}
        ),
        "params/head/bias: wanted, not stored": wanted.replace(
            params={**wanted.params, "head": {**wanted.params["head"], "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}}
        ),
        "frozen/embed/tokens: stored, not wanted": wanted.replace(frozen={}),
        "opt_state/mini_step: stored, not wanted; ": wanted.replace(opt_state=()),
        "ema/blocks/up/kernel: wanted, not stored": wanted.replace(ema=wanted.params),
    }
    for said, other in cases.items():
        with pytest.raises(CheckpointError) as caught:
            store.restore(1, other)
        assert f"checkpoint 1 in {store._directory} is of another model or optimiser: " in str(caught.value)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def _damages(content: bytes, random: np.random.Generator):
    """Yield (how, damaged content); None is a file that is gone."""
    yield "missing", None
    if content:
        yield "emptied", b""
        yield "cut", content[:-1]
        for _ in range(3):
            flipped = bytearray(content)
            flipped[random.integers(len(content))] ^= 1 << random.integers(8)
            yield "flipped", bytes(flipped)
        yield "zeroed", bytes(len(content)) if any(content) else b"\1" * len(content)
    yield "longer", content + b"\0"


def test_damage_of_any_file_is_found_and_named(store):
    state = make(0)
    store.save(40, state, {"next_batch": 41}, {"loss": 1.0})
    store.wait()
    folder, random = store._directory / "40", np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        for how, damaged in _damages(content, random):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                store.restore(40, shapes(state))
            message = str(caught.value)
            assert name in message and "40" in message, (how, message)
            assert len(message) <= 400 and "\n" not in message
            if name.startswith("state/"):
                with pytest.raises(CheckpointError, match="damaged"):
                    load_params(store._directory)
            path.write_bytes(content)
    assert_same(store.restore(40, shapes(state))[0], state)


def test_load_params_merges_the_frozen_and_leaves_the_rest(tmp_path):
    state = make(2, ema=True)
    with Store(tmp_path, metric="loss", meta={}) as store:
        store.save(1, spread(make(1, ema=True), 8), {}, {"loss": 1.0})
        store.save(2, spread(state, 8), {}, {"loss": 2.0})
    before = sorted(tmp_path.rglob("*"))
    assert_same(load_params(tmp_path), {**state.params, **state.frozen})
    assert_same(load_params(tmp_path, 2, part="ema"), {**state.ema, **state.frozen})
    assert_same(load_params(tmp_path, "best")["blocks"], make(1).params["blocks"])
    assert_same(load_params(tmp_path, "1")["blocks"], make(1).params["blocks"])
    assert_same(load_params(tmp_path, combine=lambda trained, frozen: {"t": trained, "f": frozen})["f"], state.frozen)
    assert sorted(tmp_path.rglob("*")) == before

    layout = shapes(spread({**state.params, **state.frozen}, 4))
    placed = load_params(tmp_path, "last", layout)
    assert [a.sharding for a in jax.tree.leaves(placed)] == [w.sharding for w in jax.tree.leaves(layout)]
    with pytest.raises(
        CheckpointError, match=r"of another model: head/kernel: stored bfloat16\[16,8\], wanted float32"
    ):
        load_params(tmp_path, "last", {**layout, "head": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}})


def test_what_is_not_there_is_said(tmp_path):
    for step, said in {
        "last": "it has no sealed checkpoint",
        3: "it has no sealed checkpoint",
        "best": "has a metric",
    }.items():
        with pytest.raises(CheckpointError, match=f"no checkpoint .*{said}"):
            load_params(tmp_path / "nowhere", step)
    assert not (tmp_path / "nowhere").exists()
    with Store(tmp_path, meta={}) as store:
        store.save(10, {"params": {"w": jnp.ones(1)}}, {})
    with pytest.raises(CheckpointError, match=r"no checkpoint 3 in .*; it has 10"):
        load_params(tmp_path, 3)
    with pytest.raises(CheckpointError, match="has a metric, so none is best"):
        load_params(tmp_path, "best")
    with pytest.raises(CheckpointError, match="has no ema; it has params"):
        load_params(tmp_path, part="ema")


def test_meta_says_what_the_run_was_made_of(store):
    store.save(1, {"params": {"w": jnp.ones(2)}}, {})
    store.wait()
    meta = store.meta(1)
    assert meta["config"] == {"d_model": 16}
    assert meta["versions"]["jax"] == jax.__version__
    assert {"flax", "optax", "orbax-checkpoint", "numpy"} <= set(meta["versions"])
    assert meta["devices"]["count"] == jax.device_count()
    assert meta == load_meta(store._directory)


def test_the_record_is_plain_json(store):
    store.save(1, {"params": {"w": jnp.ones((2, 3), jnp.bfloat16)}}, {"next_batch": 1}, {"loss": math.inf})
    store.wait()
    record = json.loads((store._directory / "1" / read.RECORD).read_text(), parse_constant=pytest.fail)
    assert record["leaves"] == {"params/w": ["bfloat16", [2, 3]]}
    assert record["metrics"] == {"loss": "inf"}
    assert (record["step"], record["data"]) == (1, {"next_batch": 1})


def test_a_relative_directory_is_one_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make(1)
    with Store("checkpoints", meta={}) as store:
        store.save(1, state, {})
        store.wait()
        assert_same(store.restore(1, shapes(state))[0], state)
    assert_same(load_params("checkpoints"), {**state.params, **state.frozen})


def begun(workdir, *steps):
    """Leave what a training leaves: checkpoints, and a line of its log."""
    with Store(workdir / "checkpoints", meta={}) as store:
        for step in steps:
            store.save(step, {"params": {"w": jnp.ones(1)}}, {})
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    return workdir


def test_a_run_goes_on_from_its_last_step_or_begins(tmp_path):
    assert read.to_resume(tmp_path / "new") is None
    assert read.to_resume(begun(tmp_path / "killed_before_its_first_save")) is None
    assert read.to_resume(begun(tmp_path / "run", 1, 3)) == 3


def emptied(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()


def replaced(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.write_text("")


def without_seals(checkpoints):
    for path in checkpoints.glob("*/seal.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("finished", "lose", "said"),
    [
        (False, shutil.rmtree, "has begun .it has metrics.jsonl., but its checkpoints are gone; put .* --workdir"),
        (False, emptied, "has begun .it has metrics.jsonl., but its checkpoints are gone; put .* --workdir"),
        (True, shutil.rmtree, "has finished .it has results.json., but it has no checkpoint; put .* --workdir"),
        (False, replaced, "could not be listed .Not a directory.; put the directory back"),
        (False, without_seals, "none of the checkpoints 1, 2 has a seal.json; put the checkpoints back"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path, finished, lose, said):
    workdir = begun(tmp_path / "run", 1, 2)
    if finished:
        (workdir / "results.json").write_text("{}")
    lose(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match=said):
        read.to_resume(workdir)


def test_a_newest_step_that_lost_its_seal_is_not_passed_over(tmp_path):
    begun(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / "seal.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* has no seal.json"):
        load_params(tmp_path / "checkpoints", "last")
    assert load_params(tmp_path / "checkpoints", 1)["w"].tolist() == [1]
    assert read.to_resume(tmp_path) == 1  # a training says so, goes on, and keeps the folder (test_store.py)
