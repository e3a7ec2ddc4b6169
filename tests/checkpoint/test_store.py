import contextlib
import errno
import logging
import math
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.checkpoint import read, retention, seal
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


def test_metrics_measured_after_the_save_count(tmp_path):
    """A signal ended the evaluation of step 2; its metrics come at the next start."""
    with Store(tmp_path, keep_last=1, metric="loss", meta={}) as opened:
        opened.save(1, SMALL, {}, {"loss": 2.0})
        opened.save(2, SMALL, {})
        opened.wait()
        assert (opened.judged(1), opened.judged(2), opened.best_step()) == (True, False, 1)
        opened.judge(2, {"loss": 1.0, "worst": math.inf})
        assert (opened.judged(2), opened.best_step()) == (True, 2)
        opened.save(3, SMALL, {}, {"loss": 3.0})
    assert seal.steps(tmp_path) == [2, 3]
    assert read.record(tmp_path / "2")["metrics"] == {"loss": 1.0, "worst": "inf"}
    seal.verify(tmp_path / "2")


@pytest.mark.parametrize(
    "content", ["{}", '{"format":1}', "", '{"values":{"loss":0.5},"format":1,"sha256":"0"}', "\xff"]
)
def test_damaged_metrics_are_refused(tmp_path, content):
    with Store(tmp_path, metric="loss", meta={}) as opened:
        opened.save(1, SMALL, {})
        opened.wait()
        opened.judge(1, {"loss": 1.0})
    (tmp_path / "1" / "metrics.json").write_text(content, "latin-1")
    with pytest.raises(CheckpointError, match=r"checkpoint 1 in .*metrics\.json is damaged"):
        read.best(tmp_path)


def test_metrics_that_cannot_be_written_are_said(tmp_path, monkeypatch):
    with Store(tmp_path, metric="loss", meta={}) as opened:
        opened.save(1, SMALL, {})
        opened.wait()
        monkeypatch.setattr(
            seal.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        with pytest.raises(ResourceError, match="adding metrics to checkpoint 1"):
            opened.judge(1, {"loss": 1.0})
        assert not opened.judged(1)
        assert [path.name for path in (tmp_path / "1").iterdir() if "metrics" in path.name] == []


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
        assert store.last_step() == 1
        with pytest.raises(CheckpointError, match=r"the best step is unknown: checkpoint 2 in .* has no seal.json"):
            store.best_step()
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


def scored(directory, losses, **more):
    """Leave one step for each loss; the metric of a store decides what is kept."""
    with Store(directory, metric="loss", meta={}, **more) as store:
        for step, loss in losses.items():
            store.save(step, SMALL, {}, {"loss": loss})


def fail_reading(monkeypatch, name):
    """Let reading of a file fail as on a faulty disk; return a function that repairs it."""
    content = seal._content

    def read_content(path):
        if path.parts[-len(Path(name).parts) :] == Path(name).parts:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return content(path)

    monkeypatch.setattr(seal, "_content", read_content)


@pytest.mark.parametrize("name", ["2/seal.json", "2/checkpoint.json"])
def test_a_step_that_could_not_be_read_is_not_deleted(tmp_path, monkeypatch, caplog, name):
    scored(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0})
    assert seal.steps(tmp_path) == [2, 3, 4]
    fail_reading(monkeypatch, name)
    with Store(tmp_path, metric="loss", meta={}) as store:
        for step in (5, 6, 7):
            store.save(step, SMALL, {}, {"loss": 9.0 - step})
    assert seal.steps(tmp_path) == [2, 6, 7]  # of the others the last, of which 7 is the best
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("keeping a checkpoint that cannot be judged: checkpoint 2 in ")
    assert f"{Path(name).name} could not be read (Input/output error); try again" in line
    with pytest.raises(CheckpointError, match=r"the best step is unknown: checkpoint 2 in .* could not be read"):
        store.best_step()
    monkeypatch.undo()
    assert store.best_step() == 2
    scored(tmp_path, {8: 4.0, 9: 4.0})
    assert seal.steps(tmp_path) == [2, 8, 9]


@pytest.mark.parametrize("name", ["seal.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_step_is_kept_and_takes_no_others_place(tmp_path, name, damage):
    scored(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0})
    path = tmp_path / "2" / name
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content.replace(b"s", b"S", 1))
    scored(tmp_path, {5: 2.0, 6: 3.0, 7: 4.0})
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdecimal()) == ["2", "5", "6", "7"]
    with pytest.raises(CheckpointError, match=r"the best step is unknown: checkpoint 2 in .*--init\.step") as caught:
        read.folder(tmp_path, "best")
    assert len(str(caught.value)) <= 400
    assert read.folder(tmp_path, "last") == tmp_path / "7"
    path.write_bytes(content)
    assert read.folder(tmp_path, "best") == tmp_path / "2"


def test_a_listing_that_fails_deletes_nothing(tmp_path, monkeypatch, caplog):
    scored(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    with Store(tmp_path, keep_last=1, metric="loss", meta={}) as store:
        monkeypatch.setattr(retention.read, "records", lambda _: 1 / 0)
        store.save(4, SMALL, {}, {"loss": 4.0})
    assert seal.steps(tmp_path) == [1, 2, 3, 4]
    assert "could not delete old checkpoints" in caplog.text


def test_the_best_under_an_earlier_metric_is_kept(tmp_path):
    scored(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0}, keep_last=1)
    with Store(tmp_path, keep_last=1, metric="validation/loss", meta={}) as store:
        for step in (4, 5, 6):
            store.save(step, SMALL, {}, {"validation/loss": float(step)})
    assert seal.steps(tmp_path) == [1, 4, 6]


def test_a_step_that_a_running_training_deletes_is_no_damage(tmp_path, monkeypatch):
    scored(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    listed = seal.steps(tmp_path)
    shutil.rmtree(tmp_path / "2")
    monkeypatch.setattr(seal, "steps", lambda _: listed)
    assert read.best(tmp_path) == 1


def test_files_of_the_run_are_in_every_step(tmp_path):
    files = {"tokenizer/tokenizer.json": b"{}", "notes": b"\0\n"}
    with Store(tmp_path, keep_last=1, meta={}, files=files) as store:
        store.save(1, SMALL, {})
        store.save(2, SMALL, {})
    assert {name: seal.read(tmp_path / "2", name) for name in files} == files
    (tmp_path / "2" / "notes").write_bytes(b"\0\r")
    with pytest.raises(CheckpointError, match="notes is damaged"):
        store.restore(2, shapes(SMALL))


def test_a_directory_in_which_no_step_can_be_named_is_refused_before_training(tmp_path, monkeypatch):
    def refuse(path, target):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"opening checkpoint directory .* failed: .*Read-only file system"):
        Store(tmp_path, meta={})
    assert list((tmp_path / "unsealed").iterdir()) == []


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
        ({"directory": "{file}/checkpoints"}, CheckpointError, "opening checkpoint directory .*: .*Not a directory"),
        ({"directory": "{file}"}, CheckpointError, "opening checkpoint directory .*: .*Not a directory"),
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
