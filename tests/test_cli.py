"""A toy experiment for the command line's tests."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest

from fm_jax.cli import main
from fm_jax.core import errors


@dataclass(frozen=True)
class Fit:
    num_steps: int = 10  # optimiser steps
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1 and is {self.num_steps}")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    fit: Fit = field(default_factory=Fit)


CONFIGS = {"config": Config, "debug": lambda: Config(fit=Fit(num_steps=2))}


class Recorder:
    """Calls of a run, through a plain function as experiments have it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[tuple[Config, Path, dict[str, Any]]] = []

        def run(cfg: Config, workdir: Path) -> None:
            self.calls.append((cfg, workdir, json.loads((workdir / "run.json").read_text())))
            if error is not None:
                raise error

        self.run = run

    def __call__(self, *argv: str, **more: Any) -> int:
        """Return the exit status of the command line."""
        try:
            main(self.run, CONFIGS, argv=argv, **more)
        except SystemExit as exit:
            return exit.code if isinstance(exit.code, int) else 1
        return 0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)


def test_run_gets_the_config_and_the_directory_after_run_json_is_written(tmp_path: Path) -> None:
    command = Recorder()
    assert command("--config", "debug", "--seed=3", "--workdir", "w") == 0
    ((cfg, workdir, record),) = command.calls
    assert cfg == Config(seed=3, fit=Fit(num_steps=2))
    assert workdir == Path("w")
    assert record["config"] == {"seed": 3, "fit": {"num_steps": 2, "batch_size": 8}}
    assert (record["preset"], record["argv"]) == ("debug", ["--config", "debug", "--seed=3", "--workdir", "w"])
    assert record["experiment"].endswith("test_cli")
    assert (tmp_path / "w" / "owner.json").read_text() == ""


def test_first_preset_and_runs_name_are_the_defaults() -> None:
    command = Recorder()
    assert command() == 0
    ((cfg, workdir, _),) = command.calls
    assert (cfg, workdir) == (Config(), Path("runs/test_cli"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fit.num_step", "4"], "unknown option --fit.num_step; did you mean --fit.num_steps?"),
        (["--num_steps", "4"], "did you mean --fit.num_steps?"),
        (["--wokdir", "x"], "did you mean --workdir?"),
        (["--seed", "1.5"], "--seed: '1.5' is not int"),
        (["--fit.num_steps", "0"], "fit: num_steps must be at least 1 and is 0"),
        (["--config", "debgu"], "--config: 'debgu' is not one of config, debug; did you mean debug?"),
        (["--config", "debug", "--config", "debug"], "--config is given twice"),
        (["--workdir"], "--workdir needs a value"),
        (["--workdir="], "--workdir: '' is not a path"),
        (["--workdir", "a\nb"], "--workdir: 'a\\nb' is not a path"),
        (["--workdir", "a\0b"], "--workdir: 'a\\x00b' is not a path"),
        (["--workdir", "x" * 5000], "File name too long"),
        (["--workdir", "/dev/null"], "is a file"),
        (["--workdir", "gs://bucket/x"], "is not a local path"),
        (["train"], "unexpected argument 'train'"),
        (["--" + "x" * 5000, "1"], "unknown option --xxx"),
    ],
    ids=lambda value: str(value)[:30].replace("\0", "0") if isinstance(value, list) else "",
)
def test_a_bad_command_is_one_line_and_touches_nothing(
    tmp_path: Path, capsys: Any, argv: list[str], message: str
) -> None:
    command = Recorder()
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("test_cli: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert len(err) <= 401
    assert out == ""
    assert command.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_another_config_is_refused_unless_the_key_is_resumable(capsys: Any) -> None:
    command = Recorder()
    assert command("--workdir", "w") == 0
    assert command("--workdir", "w") == 0
    Path("w", "results.json").write_text("{}")
    assert command("--workdir", "w", "--fit.num_steps", "20", "--seed", "1") == 2
    assert "seed: 0 -> 1; fit.num_steps: 10 -> 20" in capsys.readouterr().err
    assert command("--workdir", "w", "--fit.num_steps", "20", resumable=("fit.num_steps",)) == 0
    assert "fit.num_steps: 10 -> 20" in capsys.readouterr().err
    assert len(command.calls) == 3
    assert [start["changed"] for start in command.calls[-1][2]["starts"]] == [[], [], ["fit.num_steps: 10 -> 20"]]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.ConfigError("a\n  b"), 2, "error: a b"),
        (errors.DataError("d"), 3, "error: d"),
        (errors.CheckpointError("c"), 4, "error: c"),
        (errors.ResourceError("r"), 5, "error: r"),
        (errors.NumericError("n"), 6, "error: n"),
        (errors.Preempted("saved at step 7"), 75, "stopped: saved at step 7"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 5, "error: no space left on the disk of f"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
            5,
            "error: out of device memory; lower",
        ),
        (MemoryError("Unable to allocate 224. GiB"), 5, "error: out of memory; lower the batch size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(capsys: Any, error: BaseException, code: int, line: str) -> None:
    assert Recorder(error)() == code
    err = capsys.readouterr().err
    assert f"test_cli: {line}" in err
    assert "Traceback" not in err
    assert Path("runs/test_cli/owner.json").read_text() == ""


def test_sigterm_before_training_is_one_line_and_75(capsys: Any) -> None:
    def run(cfg: Any, workdir: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(run, CONFIGS, argv=[])
    assert end.value.code == errors.Preempted.code
    assert "stopped: SIGTERM: stopped outside of training" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["EACCES", "EROFS", "EFBIG", "EIO", "EMFILE", "ENAMETOOLONG"])
def test_a_fault_of_the_disk_is_one_line(capsys: Any, name: str) -> None:
    number = getattr(errno, name)
    assert Recorder(OSError(number, os.strerror(number), "data/file"))() == 5
    assert f"test_cli: error: data/file: {os.strerror(number)}" in capsys.readouterr().err


def test_debug_shows_the_traceback_and_long_messages_are_cut(capsys: Any, monkeypatch: Any) -> None:
    assert Recorder(errors.DataError("x" * 1000))() == 3
    assert len(capsys.readouterr().err) == 401
    monkeypatch.setenv("FM_DEBUG", "1")
    assert Recorder(errors.DataError("x"))() == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        Recorder(ZeroDivisionError("bug"))()


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--seed", "x", "--help"], ["--config", "debug", "--help"]])
def test_help_lists_presets_and_options_and_writes_nothing(tmp_path: Path, capsys: Any, argv: list[str]) -> None:
    assert Recorder()(*argv) == 0
    out = capsys.readouterr().out
    assert "A toy experiment" in out
    assert "config, debug" in out
    steps = next(line for line in out.splitlines() if "--fit.num_steps" in line)
    assert steps.split() == ["--fit.num_steps", "int", "2" if "debug" in argv else "10", "optimiser", "steps"]
    assert list(tmp_path.iterdir()) == []


TOY = '''
"""Toy."""
from dataclasses import dataclass
from fm_jax.cli import main

@dataclass(frozen=True)
class Config:
    seed: int = 0

def run(cfg, workdir):
    import time, jax
    (workdir / f"cache{jax.process_index()}").write_text(str(jax.config.jax_compilation_cache_dir))
    jax.jit(lambda x: x + 1)(1)
    time.sleep(30 if jax.process_count() > 1 else 0)

if __name__ == "__main__":
    main(run, {"config": Config})
'''


def launch(path: Path, *argv: str, **env: str) -> subprocess.Popen[str]:
    (path / "toys").mkdir(exist_ok=True)
    (path / "toys" / "toy.py").write_text(TOY)
    ours = ("JAX_COMPILATION", "JAX_PERSISTENT", "FM_", "XDG")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-m", "toys.toy", *argv],
        cwd=path,
        env=clean
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "FM_CACHE": str(path / "cache"), "JAX_PLATFORMS": "cpu"}
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_python_dash_m_names_the_run_and_keeps_a_private_compile_cache(tmp_path: Path) -> None:
    process = launch(tmp_path, "--seed", "4")
    assert process.communicate(timeout=300)[1] == ""
    assert process.returncode == 0
    record = json.loads((tmp_path / "runs/toy/run.json").read_text())
    assert (record["experiment"], record["config"]) == ("toys.toy", {"seed": 4})
    assert (tmp_path / "runs/toy/cache0").read_text() == str(tmp_path / "cache/xla")
    assert (tmp_path / "cache/xla").stat().st_mode & 0o777 == 0o700
    assert any((tmp_path / "cache/xla").iterdir())  # even a program that compiles at once is kept


def test_when_one_of_two_processes_refuses_both_end_at_once(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "run.json").write_text(json.dumps({"experiment": "toys.toy", "config": {"seed": 1}}))
    (tmp_path / "w" / "results.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"FM_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "FM_NUM_PROCESSES": "2"}
    processes = [launch(tmp_path, "--workdir", "w", **place, FM_PROCESS_ID=str(i)) for i in range(2)]
    try:
        err = processes[0].communicate(timeout=300)[1]
        assert processes[0].returncode == 2
        assert err.splitlines()[-1].endswith("old values: seed: 1 -> 0")
        assert processes[1].wait(timeout=20) != 0  # well below the heartbeat's 30 s and the barrier's 300 s
    finally:
        for process in processes:
            process.kill()
            process.wait()
