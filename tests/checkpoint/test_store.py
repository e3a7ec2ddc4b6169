import contextlib
import errno
import logging
import math
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.checkpoint import read, seal
from fm_jax.checkpoint.store import Store
from fm_jax.core.errors import CheckpointError, ConfigError, ResourceError
from tests.checkpoint.states import assert_same, make, shapes, spread

SMALL = {"params": {"w": jnp.arange(4)}}


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "checkpoints", meta={"config": {"d_model": 16}})
    yield opened
    with contextlib.suppress(CheckpointError, ResourceError):  # the test has looked at it
        opened.close()


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_keeps_every_bit(store, ema):
    state = make(3, ema=ema, frozen=not ema)
    store.save(3, state, {"next_batch": 7, "fingerprint": "abc"})
    store.wait()
    restored, data = store.restore(store.last_step(), shapes(state))
    assert_same(restored, state)
    assert data == {"next_batch": 7, "fingerprint": "abc"}


def test_the_state_may_be_donated_while_it_is_saved(store):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state), donate_argnums=0)
    state, kept = spread(make(0, width=2048), 8), {}
    for step in (1, 2, 3):
        state = advance(state)
        kept[step] = jax.tree.map(np.array, state)  # copies: a view would keep the buffer from being reused
        store.save(step, state, {})
        for _ in range(3):
            state = advance(state)
    store.wait()
    for step in (2, 3):
        assert_same(store.restore(step, shapes(state))[0], kept[step])


def test_only_a_sealed_step_is_named(store, monkeypatch):
    go, publish = threading.Event(), seal.publish
    store.save(1, SMALL, {}, {"loss": 2.0})
    store.wait()
    monkeypatch.setattr(seal, "publish", lambda *paths: go.wait(20) and publish(*paths))
    store.save(2, SMALL, {}, {"loss": 1.0})  # returns though the seal is not written
    assert (store.last_step(), seal.steps(store._directory)) == (1, [1])
    go.set()
    store.wait()
    assert store.last_step() == 2


def test_the_last_and_the_best_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: math.nan, 5: 2.0, 6: 6.0, 7: 1.0}
    with Store(tmp_path, keep_last=2, keep_best=1, metric="loss", meta={}) as store:
        for step, loss in losses.items():
            store.save(step, SMALL, {}, {"loss": loss, "other": 0.0})
        store.save(8, SMALL, {})  # no evaluation at this step
        store.wait()
        assert seal.steps(tmp_path) == [2, 7, 8]
        assert (store.last_step(), store.best_step()) == (8, 2)  # of equals the earliest
    assert read.record(tmp_path / "7")["metrics"] == {"loss": 1.0, "other": 0.0}
    assert list((tmp_path / "unsealed").iterdir()) == []
    with Store(tmp_path, keep_last=1, keep_best=0, meta={}) as store:
        store.save(9, SMALL, {})
    assert seal.steps(tmp_path) == [9]


def test_nothing_is_deleted_before_the_newer_step_is_sealed(tmp_path, monkeypatch):
    publish, before = seal.publish, []

    def watched(*paths):
        before.append(seal.steps(tmp_path))
        return publish(*paths)

    monkeypatch.setattr(seal, "publish", watched)
    with Store(tmp_path, keep_last=1, meta={}) as store:
        for step in (1, 2, 3):
            store.save(step, SMALL, {})
    assert before == [[], [1], [2]]
    assert seal.steps(tmp_path) == [3]


def test_a_metric_that_nobody_measures_is_said_once(tmp_path, caplog):
    with Store(tmp_path, metric="val_loss", meta={}) as store:
        for step in (1, 2):
            store.save(step, SMALL, {}, {"loss": 1.0})
    assert store.best_step() is None
    assert [r.getMessage() for r in caplog.records] == ["checkpoint 1 cannot be best: metric 'val_loss' is not in loss"]


@pytest.mark.parametrize("step", [5, 4, -1])
def test_a_step_that_is_not_new_is_refused(store, step):
    store.save(5, SMALL, {"next_batch": 1})
    with pytest.raises(CheckpointError, match=f"checkpoint {step} is not above the latest, 5, in .*; to go back"):
        store.save(step, {"params": {"w": jnp.arange(4) + 1}}, {})
    assert_same(store.restore(5, shapes(SMALL))[0], SMALL)


def test_an_unsealed_step_is_ignored_aloud_and_kept(tmp_path, caplog):
    with Store(tmp_path, meta={}) as store:
        store.save(1, SMALL, {})
        store.save(2, SMALL, {})
    (tmp_path / "2" / seal.SEAL).unlink()
    (tmp_path / "unsealed" / "3" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    with Store(tmp_path, meta={}) as store:
        assert [r.getMessage() for r in caplog.records] == [
            f"ignoring unfinished checkpoints 3, 2 in {tmp_path}; the last sealed one is 1"
        ]
        assert (store.last_step(), store.best_step()) == (1, None)
        with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* has no seal.json, so it is unfinished"):
            store.restore(2, shapes(SMALL))
        caplog.clear()
        store.save(2, SMALL, {})
        store.wait()
        assert store.last_step() == 2
        aside = tmp_path / "unsealed" / "2.aside-1"
        assert (aside / read.RECORD).is_file()
        assert [r.getMessage() for r in caplog.records] == [
            f"checkpoint 2 has no seal; moved it to {aside} before saving that step"
        ]
        caplog.clear()
        store.save(4, SMALL, {})
        store.wait()
        assert not (tmp_path / "unsealed" / "3").exists() and aside.exists()
        assert "removed the unfinished checkpoint" in caplog.text


def test_no_space_is_said_before_anything_is_written(store, monkeypatch):
    state = make(0)
    store.save(1, state, {})
    usage = shutil.disk_usage(store._directory)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"no space for checkpoint 2: need \d\.\d MB, have 0\.2 MB in /"):
        store.save(2, state, {})
    monkeypatch.undo()
    assert store.last_step() == 1
    assert list((store._directory / "unsealed").iterdir()) == []
    store.save(2, state, {})


def test_a_disk_that_fills_up_during_the_save(store, caplog):
    """A limit on file size makes the real writes fail, as a quota would."""
    large = {"params": {"w": jax.random.normal(jax.random.key(0), (512, 1024))}}
    store.save(1, SMALL, {})
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        store.save(2, large, {})
        with pytest.raises(ResourceError, match=r"saving checkpoint 2 in .* failed: no space on the disk left"):
            store.save(3, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Traceback" not in caplog.text
    assert store.last_step() == 1
    assert list((store._directory / "unsealed").iterdir()) == []  # its space is free again
    store.save(2, large, {})
    store.wait()
    assert_same(store.restore(2, shapes(large))[0], large)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError(errno.EIO, "Input/output error")])
def test_a_failed_seal_is_raised_once_and_harms_nothing(store, monkeypatch, error):
    store.save(1, SMALL, {})
    store.wait()

    def fail(*paths):
        raise error

    monkeypatch.setattr(seal, "publish", fail)
    store.save(2, SMALL, {})
    kind = ResourceError if error.errno == errno.ENOSPC else CheckpointError
    with pytest.raises(kind, match="saving checkpoint 2 in") as caught:
        store.wait()
    assert caught.value.__cause__ is error
    store.wait()
    monkeypatch.undo()
    assert store.last_step() == 1
    store.save(2, SMALL, {})
    store.wait()
    assert store.last_step() == 2


def test_the_first_error_leaves_the_block_not_the_failed_save(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(seal, "publish", lambda *paths: 1 / 0)
    with pytest.raises(KeyError), Store(tmp_path, meta={}) as store:
        store.save(1, SMALL, {})
        raise KeyError("the run's own")
    assert "saving checkpoint 1" in caplog.records[-1].getMessage()


def test_retention_that_cannot_delete_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with Store(tmp_path, keep_last=1, meta={}) as store, caplog.at_level(logging.WARNING):
        for step in (1, 2):
            store.save(step, SMALL, {})
    assert "could not delete old checkpoints" in caplog.text
    assert seal.steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"keep_last": 0}, ConfigError, "keep_last=0 must be at least 1"),
        ({"keep_best": -1}, ConfigError, "keep_best=-1 at least 0"),
        ({"meta": {"config": object()}}, ConfigError, "must be JSON data"),
        ({"directory": "gs://bucket/run"}, ConfigError, "gs://bucket/run is not a local path; mount the bucket"),
        ({"directory": "{file}/checkpoints"}, CheckpointError, "cannot create .*: Not a directory"),
    ],
)
def test_a_store_that_cannot_work_says_so(tmp_path, options, kind, said):
    (tmp_path / "file").write_text("")
    options = {"directory": str(tmp_path / "c"), "meta": {}, **options}
    directory = options.pop("directory").format(file=tmp_path / "file")
    with pytest.raises(kind, match=said):
        Store(directory, **options)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"params": {"key": jax.random.key(0)}}, "params/key is a typed random key"),
        ({"params": {"n": 3}}, "params/n is a int; a checkpoint can hold arrays"),
        ({"a": {"b/c": jnp.ones(1)}, "a/b": {"c": jnp.ones(1)}}, "two leaves have the name a/b/c"),
    ],
)
def test_a_state_that_cannot_be_named_is_refused(store, state, said):
    with pytest.raises(ValueError, match=said):
        store.save(1, state, {})
    assert store.last_step() is None


def test_data_that_is_no_json_is_refused_before_writing(store):
    with pytest.raises(ConfigError, match="must be JSON data"):
        store.save(1, {"params": {"w": jnp.ones(1)}}, {"position": np.int64(3)})
    assert list((store._directory / "unsealed").iterdir()) == []
