import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fm_jax.core import workdir
from fm_jax.core.errors import ConfigError, ResourceError
from fm_jax.core.workdir import Claim, claim, write_atomically

CONFIG = {"seed": 0, "opt": {"lr": 0.1, "b1": 0.9}, "fit": {"num_steps": 10}}


def take(path: Path, config: dict[str, Any] = CONFIG, experiment: str = "experiments.a", **more: Any) -> Claim:
    return claim(path, experiment=experiment, config=config, **more)


def ran(path: Path) -> Path:
    """Leave a directory as a finished run leaves it."""
    with take(path) as held:
        held.write_record({"experiment": "experiments.a", "config": CONFIG, "time": "t0"})
    (path / "results.json").write_text("{}")
    return path


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def test_a_new_directory_is_owned_then_released(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with take(path) as held:
        owner = json.loads((path / "owner.json").read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        assert (held.previous, held.changed, held.notices) == (None, [], [])
        held.write_record({"experiment": "experiments.a", "config": CONFIG, "time": "t", "argv": ["--seed", "0"]})
    assert (path / "owner.json").read_text() == ""
    record = json.loads((path / "run.json").read_text())
    assert record["config"] == CONFIG
    assert record["starts"] == [{"time": "t", "argv": ["--seed", "0"], "changed": []}]
    with take(path) as held:
        assert held.notices == []


def test_a_run_that_never_began_leaves_no_trace(tmp_path: Path) -> None:
    with take(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_every_start_is_kept_with_its_changes(tmp_path: Path) -> None:
    path = ran(tmp_path / "a")
    longer = CONFIG | {"fit": {"num_steps": 20}}
    with take(path, longer, resumable=("fit.*",)) as held:
        assert held.changed == ["fit.num_steps: 10 -> 20"]
        held.write_record({"experiment": "experiments.a", "config": longer, "time": "t1"})
    record = json.loads((path / "run.json").read_text())
    assert record["config"] == longer
    assert [(start["time"], start["changed"]) for start in record["starts"]] == [
        ("t0", []),
        ("t1", ["fit.num_steps: 10 -> 20"]),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": CONFIG | {"seed": 1}}, r"another config; .* old values: seed: 0 -> 1$"),
        ({"config": {**CONFIG, "opt": {"lr": 0.2}}}, r"opt\.lr: 0\.1 -> 0\.2; opt\.b1: 0\.9 -> \(not set\)$"),
        ({"config": {**CONFIG, "fit": {"num_steps": 20}}, "resumable": ("opt.*",)}, r"fit\.num_steps: 10 -> 20$"),
        ({"config": {f"k{i}": i for i in range(9)}}, r"; .* and 7 more$"),
        ({"experiment": "experiments.b"}, r"holds a run of experiments\.a, not experiments\.b"),
    ],
)
def test_another_experiment_or_config_is_refused_and_nothing_is_touched(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = ran(tmp_path / "a")
    before = snapshot(path)
    with pytest.raises(ConfigError, match=message):
        take(path, **change)
    assert snapshot(path) == before
    take(path).release()  # the refusal did not keep the lock


@pytest.mark.parametrize("now", ["experiments.vision.a", "experiments.speech.asr.a", "a"])
def test_an_experiment_that_moved_to_another_folder_goes_on(tmp_path: Path, now: str) -> None:
    path = ran(tmp_path / "a")
    with take(path, experiment=now) as held:
        assert held.changed == []
        held.write_record({"experiment": now, "config": CONFIG, "time": "t1"})
    assert json.loads((path / "run.json").read_text())["experiment"] == now
    with pytest.raises(ConfigError, match=r"\.vision\.b; give another"):
        take(path, experiment="experiments.vision.b")


def test_what_was_refused_before_it_made_anything_may_be_corrected(tmp_path: Path) -> None:
    path = ran(tmp_path / "a")
    (path / "results.json").rename(path / "rank0.log")  # what a launcher leaves
    with take(path, CONFIG | {"seed": 1}) as held:
        assert held.changed == ["seed: 0 -> 1"]
    with take(path, experiment="experiments.b") as held:
        held.write_record({"experiment": "experiments.b", "config": CONFIG, "time": "t1"})
    assert [start["time"] for start in json.loads((path / "run.json").read_text())["starts"]] == ["t0", "t1"]
    (path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"holds a run of experiments\.b"):
        take(path)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"experiment": 1}', "[" * 100_000, '{"config": {}}', "\x80"])
def test_a_damaged_record_is_named(tmp_path: Path, body: str) -> None:
    path = ran(tmp_path / "a")
    (path / "run.json").write_text(body, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        take(path)


def test_a_run_without_its_record_is_refused(tmp_path: Path) -> None:
    """Otherwise another experiment or config would go on from its checkpoints."""
    path = ran(tmp_path / "a")
    (path / "run.json").unlink()
    before = snapshot(path)
    with pytest.raises(ConfigError, match=r"has the files of a run \(results\.json\), but its run\.json is missing"):
        take(path, CONFIG | {"seed": 1}, experiment="experiments.b")
    assert snapshot(path) == before


def test_two_that_begin_at_the_same_moment_do_not_remove_each_others_directory(
    tmp_path: Path, monkeypatch: Any
) -> None:
    held = take(tmp_path / "a")
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))  # listed before the other process had begun
    with pytest.raises(ConfigError, match="in use by pid"):
        take(tmp_path / "a")
    monkeypatch.undo()
    assert (tmp_path / "a" / "owner.json").read_text()
    held.release()


def test_a_directory_that_is_removed_while_it_is_opened_is_not_owned(tmp_path: Path, monkeypatch: Any) -> None:
    flock = fcntl.flock

    def removed(lock: int, how: int) -> None:
        (tmp_path / "a" / "owner.json").unlink()  # by its owner, which never began
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(ConfigError, match="was released by another process just now; run the command again"):
        take(tmp_path / "a")


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"contains files that no run wrote \(thesis\.tex\)"):
        take(tmp_path)
    assert snapshot(tmp_path) == before


def test_what_launchers_and_mounts_leave_is_no_obstacle(tmp_path: Path) -> None:
    for name in (".DS_Store", "slurm-12.out", "rank0.log"):
        (tmp_path / name).touch()
    (tmp_path / "lost+found").mkdir()
    take(tmp_path).release()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/proc/nothing/a", "cannot be used: .*; give another --workdir"),
        ("a" * 300, "cannot be used: File name too long"),
        ("a\0b", "cannot be used"),
        ("gs://bucket/run", "is not a local path"),
        ("/dev/null", "is a file"),
        ("/dev/null/a", "cannot be used: Not a directory"),
    ],
)
def test_an_unusable_path_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        take(Path(path) if path.startswith(("/", "gs:")) else tmp_path / path)
    assert len(str(caught.value)) < 400


def test_a_full_disk_is_a_lack_of_resources_and_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="no space left"):
        take(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import os, sys, time
from pathlib import Path
from fm_jax.core.workdir import claim
held = claim(Path(sys.argv[1]), experiment="experiments.a", config={})
held.write_record({"experiment": "experiments.a", "config": {}})
child = os.fork() if sys.argv[2] == "fork" else 0
if child or sys.argv[2] != "fork":
    print("held", child, flush=True)
time.sleep(60)
"""


@contextmanager
def holder(path: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_trainers_cannot_share_a_directory_and_a_killed_one_lets_it_go(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with holder(path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held 0\n"
        before = snapshot(path)
        with pytest.raises(ConfigError, match=rf"in use by pid {other.pid} on host \S+ since \S+$"):
            take(path, {})
        assert snapshot(path) == before
        other.send_signal(signal.SIGKILL)
        other.wait()
        with take(path, {}) as held:
            (notice,) = held.notices
            assert f"taking over from pid {other.pid}" in notice


def test_a_child_that_outlives_the_trainer_is_named_as_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with holder(path, "fork") as other:
        assert other.stdout is not None
        child = int(other.stdout.readline().split()[1])
        try:
            other.kill()
            other.wait()
            with pytest.raises(ConfigError, match="that process has ended, but a child of it still holds the lock"):
                take(path, {})
        finally:
            os.kill(child, signal.SIGKILL)


def test_without_file_locks_the_owner_file_decides(tmp_path: Path, monkeypatch: Any) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    first = take(tmp_path / "a")
    with pytest.raises(ConfigError, match=rf"in use by pid {os.getpid()} .*remove .*owner\.json"):
        take(tmp_path / "a")
    monkeypatch.setattr(workdir, "_boot_id", lambda: "another boot")  # this machine was started again since
    second = take(tmp_path / "a")
    assert "taking over" in second.notices[0]
    second.release()
    first.release()


def test_an_atomic_write_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "f", "new")
    assert calls == ["fsync", "replace", "fsync"]
    assert (tmp_path / "f").read_text() == "new"


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "f").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        ResourceError, match=r"/f cannot be written: Input/output error; free space or use another disk"
    ):
        write_atomically(tmp_path / "f", "new")
    assert snapshot(tmp_path) == {"f": b"old"}


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, ResourceError), (errno.EDQUOT, ResourceError), (errno.EROFS, ConfigError)],
)
def test_a_record_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: Any, number: int, kind: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    path = ran(tmp_path / "a")
    before = (path / "run.json").read_text()
    monkeypatch.setattr(os, "replace", fail)
    with take(path) as held, pytest.raises(kind, match=r"run\.json cannot be written: "):
        held.write_record({"experiment": "experiments.a", "config": CONFIG})
    assert (path / "run.json").read_text() == before


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long") as caught:
        write_atomically(tmp_path / ("f" * 255), "new")
    assert len(str(caught.value)) < 300 and not list(tmp_path.iterdir())
