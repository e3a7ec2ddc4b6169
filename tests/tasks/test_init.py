"""What a training starts from: which paths are runs, and which step of a run is opened."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fm_jax.checkpoint.store import Store
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.tasks.init import EarlierRun, Init, open_run


def leave(workdir: Path, *losses: float) -> Path:
    """Leave one step for each loss; step n holds n everywhere."""
    with Store(workdir / "checkpoints", metric="loss", meta={"config": {"seed": 3}}) as store:
        for step in (1, 2):
            state = {"params": {"a": np.full(2, step)}, "frozen": {"b": np.full(1, 10 * step)}}
            store.save(step, state, {}, {"loss": losses[step - 1]} if losses else {})
    return workdir


@pytest.mark.parametrize(
    ("losses", "step", "wanted"), [((1.0, 2.0), "best", 1), ((1.0, 2.0), "last", 2), ((), "best", 2), ((), "1", 1)]
)
def test_the_step_that_was_asked_for_is_opened(
    losses: tuple[float, ...], step: str, wanted: int, tmp_path: Path
) -> None:
    run = open_run(leave(tmp_path, *losses), step=step)
    assert run is not None and run.config == {"seed": 3} and run.workdir == tmp_path
    params = run.params()
    assert params["a"].tolist() == [wanted] * 2 and params["b"].tolist() == [10 * wanted]
    summed = run.params(lambda trained, frozen: {"sum": trained["a"].sum() + frozen["b"]})
    assert summed["sum"].tolist() == [12 * wanted]


def test_a_running_mean_is_what_was_evaluated(tmp_path: Path) -> None:
    state = {"params": {"a": np.zeros(2)}, "frozen": {"b": np.ones(1)}, "ema": {"a": np.full(2, 7.0)}}
    with Store(tmp_path / "checkpoints", meta={"config": {"ema_decay": 0.9}}) as store:
        store.save(1, state, {})
    run = open_run(tmp_path)
    assert run is not None
    assert {name: leaf.tolist() for name, leaf in run.params().items()} == {"a": [7.0, 7.0], "b": [1.0]}


def test_a_folder_and_a_public_name_are_no_runs(tmp_path: Path) -> None:
    assert open_run(tmp_path) is None
    assert open_run("google-bert/bert-base-uncased", "main") is None


@pytest.mark.parametrize("name", ["runs/never_made", "{}/nowhere"])
def test_a_path_that_is_not_there_is_not_taken_for_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a run's work directory"):
        open_run(name.format(tmp_path))


@pytest.mark.parametrize("name", ["seal.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_no_other_step_takes_the_place_of_a_damaged_best_one(name: str, damage: str, tmp_path: Path) -> None:
    path = leave(tmp_path, 1.0, 2.0) / "checkpoints" / "1" / name
    path.unlink() if damage == "gone" else path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"the best step is unknown: checkpoint 1 in .*--init\.step; hub_convert"):
        open_run(tmp_path)
    for step in ("last", "2"):  # unless it is asked for
        run = open_run(tmp_path, step=step)
        assert run is not None and run.step == 2 and run.params()["a"].tolist() == [2, 2]
    with pytest.raises(CheckpointError, match="checkpoint 1 in"):
        open_run(tmp_path, step="1")


def test_one_step_is_opened_even_if_a_better_one_is_saved_meanwhile(tmp_path: Path) -> None:
    run = open_run(leave(tmp_path, 2.0, 3.0))
    with Store(tmp_path / "checkpoints", metric="loss", meta={"config": {"seed": 4}}, keep_last=3) as store:
        store.save(3, {"params": {"a": np.full(2, 3)}, "frozen": {"b": np.full(1, 30)}}, {}, {"loss": 1.0})
    assert run is not None and run.step == 1 and run.params()["a"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_run_that_cannot_be_looked_at_is_not_taken_for_a_public_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, stat = leave(tmp_path) / name, os.stat

    def fail(path: Any, **options: Any) -> os.stat_result:
        if path == refused:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", fail)
        with pytest.raises(CheckpointError, match=rf"{refused.name} could not be read \(Input/output error\)"):
            open_run(tmp_path)


@pytest.mark.parametrize("step", ["first", "-1", "1.5", "", "²"])
def test_a_step_that_is_none_is_refused(step: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not best, last or the number of a checkpoint"):
        Init(tmp_path, step=step)
    with pytest.raises(ConfigError, match="is not best, last or the number of a checkpoint"):
        open_run(tmp_path, step=step)


def test_what_a_run_has_not_is_refused(tmp_path: Path) -> None:
    leave(tmp_path)
    with pytest.raises(CheckpointError, match="is a run, which has no revision 'main'"):
        open_run(tmp_path, "main")
    with pytest.raises(CheckpointError, match=r"is a run, which has no config\.json; do not ignore mystery there"):
        open_run(tmp_path, ignore=iter(["mystery"]))
    with pytest.raises(CheckpointError, match="7"):
        open_run(tmp_path, step="7")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="begun"):
        open_run(tmp_path / "begun")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder is not a run's work directory, so it has no step last"):
        open_run(tmp_path / "folder", step="last")


def test_a_start_that_is_none_is_refused_where_one_is_needed() -> None:
    assert Init(Path("a"), "main").source == Path("a")
    with pytest.raises(ConfigError, match=r"init\.from is not set"):
        _ = Init().source
    with pytest.raises(ConfigError, match="revision main needs a public model"):
        Init(revision="main")
    with pytest.raises(ConfigError, match="step 7 needs a run: set from"):
        Init(step="7")
    with pytest.raises(ConfigError, match="ignore mystery,riddle needs a public model"):
        Init(ignore=("mystery", "riddle"))
    assert Init(Path("a"), "main", "last", ("mystery",)).options == {
        "revision": "main",
        "step": "last",
        "ignore": ("mystery",),
    }


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, "holds null as its config, not a JSON object"),
        ({"config": [1]}, r"holds \[1\] as its config"),
        ({"config": {}, "classes": 3}, "holds 3 as its classes, not a list of names"),
        ({"config": {}, "classes": ["a", 1]}, r'holds \["a", 1\] as its classes'),
        ({"config": {}, "model": {"class": ["x"]}}, r'trained a model of class \["x"\], which is unknown'),
        ({"config": {}, "git": [1]}, "check out the revision that trained it"),
        ({"config": {}, "git": {}}, "check out the revision that trained it"),
    ],
)
def test_a_checkpoint_that_says_something_else_is_refused(meta: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = EarlierRun(tmp_path, 1, meta)
    with pytest.raises(CheckpointError, match=said):
        _ = run.config, run.classes, run.model()
