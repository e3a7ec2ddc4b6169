import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
VERBS = ("local", "list", "test", "check", "setup", "slurm", "tpu", "k8s")

# Stands in for Python: makes an environment that holds a copy of itself, notes what pip is asked, else is Python.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo venv >>calls ;;
  '-m pip') shift 2; echo "pip $*" >>calls; [[ ! -e broken_index ]] ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
STUB = """
import os, signal, sys, time
rank = os.environ.get("FM_PROCESS_ID", "0")
mode = sys.argv[1] if len(sys.argv) > 1 else ""
def save(number, frame):
    print("told", rank, flush=True)
    time.sleep(0.5)
    sys.exit(75)
if mode == "saves":
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
if mode == "dies" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "dies":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))  # what the loss of the other one did to it
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"started{rank}", "w").close()
if mode == "deaf" and rank == "1":
    while not os.path.exists("started0"):
        time.sleep(0.01)
    sys.exit(3)
if mode in ("saves", "deaf", "dies"):
    time.sleep(300)
os.write(1, f"{rank} {os.environ.get('FM_NUM_PROCESSES')} {sys.argv[1:]}\\n".encode())
"""

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("requirements.lock", ".lock/build.txt", ".lock/cuda12.txt", ".lock/cuda13.txt", "experiments/stub.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STUB if name.endswith(".py") else name)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def environment(clone: Path, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FM_", "XLA_", "TPU_"))}
    return kept | {"FM_EXTRA": "cpu", "FM_PYTHON": str(clone / "python")} | extra


@pytest.fixture
def launch(clone: Path) -> Launch:
    def call(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "launch.sh", *arguments],
            cwd=clone,
            env=environment(clone, **extra),
            capture_output=True,
            text=True,
            timeout=240,  # against a hang; a busy machine may need many seconds
        )

    return call


def words(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [(), ("lokal",), ("--dry-run",), ("tpu",), ("tpu", "--dry-run", "--zone=z")])
def test_a_verb_or_name_that_is_missing_prints_the_use_and_exits_2(launch: Launch, arguments: tuple[str, ...]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert all(f"\n  {verb} " in done.stderr for verb in VERBS)
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("local", "experiments.absent"), "experiments/absent.py"),
        (("local", "stub"), "'stub'"),
        (("local", "-n", "two", "experiments.stub"), "'two'"),
        (("slurm", "--nodes=2"), "experiments.NAME"),
        (("k8s", "--pods=2", "experiments.stub"), "--pods=2"),
        (("k8s", "--nodes=many", "experiments.stub"), "many"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_made(
    launch: Launch, clone: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not (clone / "calls").exists()


@pytest.mark.parametrize(
    "before",
    [("local",), ("local", "-n", "2"), ("slurm", "--nodes=2"), ("tpu", "pod"), ("k8s", "--nodes=2")],
    ids=" ".join,
)
@pytest.mark.parametrize("old", ["experiments.moved", "experiments.attic.moved", "experiments.speech.asr.moved.moved"])
def test_an_old_name_says_the_new_one(launch: Launch, clone: Path, before: tuple[str, ...], old: str) -> None:
    new = clone / "experiments/speech/asr/moved.py"
    new.parent.mkdir(parents=True)
    new.touch()
    done = launch(*before, old, "--key", "value")
    assert done.returncode == 2
    assert done.stderr == f"launch: {old} has moved; use experiments.speech.asr.moved\n"
    assert not done.stdout
    assert not (clone / "calls").exists()


@pytest.mark.parametrize("arguments", [("list",), ("local",)])
def test_the_list_holds_every_experiment_with_its_first_line(
    launch: Launch, clone: Path, arguments: tuple[str, ...]
) -> None:
    shutil.rmtree(clone / "experiments")
    shutil.copytree(ROOT / "experiments", clone / "experiments")
    deep = clone / "experiments/speech/asr"
    deep.mkdir(parents=True)
    (deep / "__init__.py").write_text('"""No experiment."""\n')
    (deep / "one_line.py").write_text('r"""A title of `one` line\'s length."""\n')
    done = launch(*arguments)
    assert done.returncode == 0
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    wanted = {}
    for file in (clone / "experiments").rglob("*.py"):
        if not file.stem.startswith("_"):  # a part that experiments share
            doc = ast.get_docstring(ast.parse(file.read_text()))
            assert doc is not None
            wanted[".".join(file.relative_to(clone).with_suffix("").parts)] = doc.splitlines()[0]
    assert listed == wanted
    assert wanted["experiments.speech.asr.one_line"] == "A title of `one` line's length."
    assert not (clone / "calls").exists()


def test_help_is_no_error(launch: Launch) -> None:
    done = launch("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("use: ./launch.sh")


@pytest.mark.parametrize(("name", "value"), [("FM_PYTHON", "/nowhere/python"), ("FM_EXTRA", "cuda11")])
def test_a_bad_choice_is_named(launch: Launch, name: str, value: str) -> None:
    done = launch("setup", **{name: value})
    assert done.returncode == 2
    assert value in done.stderr


def test_local_keeps_every_argument_whole(launch: Launch, clone: Path) -> None:
    given = ["experiments.stub", "--text", "two words", "--quote", 'it\'s "so"', "--empty", "", "--glob", "*"]
    assert words(launch("local", "--dry-run", *given))[-1] == ["exec", "env", ".venv/bin/python", "-m", *given]
    assert not (clone / ".venv").exists()
    assert launch("local", *given).stdout == f"0 None {given[1:]}\n"


def test_local_n_gives_each_process_its_place(launch: Launch) -> None:
    runs = [line for line in words(launch("local", "--dry-run", "-n", "2", "experiments.stub", "a b")) if "env" in line]
    assert [line[-4:] for line in runs] == [[".venv/bin/python", "-m", "experiments.stub", "a b"]] * 2
    given = [dict(word.split("=", 1) for word in line if "=" in word) for line in runs]
    assert [env.pop("FM_PROCESS_ID") for env in given] == ["0", "1"]
    assert given[0] == given[1]
    assert given[0]["FM_NUM_PROCESSES"] == "2"
    assert given[0]["FM_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
    assert given[0]["JAX_NUM_CPU_DEVICES"] == "1"


def test_local_n_runs_them_all(launch: Launch) -> None:
    done = launch("local", "-n", "3", "experiments.stub", "a b")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"{rank} 3 ['a b']" for rank in range(3)]


def test_the_first_failure_ends_the_rest_even_where_they_do_not_hear_term(launch: Launch) -> None:
    start = time.monotonic()
    done = launch("local", "-n", "2", "experiments.stub", "deaf", FM_GRACE="0")
    assert done.returncode == 3
    assert time.monotonic() - start < 200  # the deaf one would go on for 300 s


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_reaches_every_process_once_and_their_75_is_handed_on(
    launch: Launch, clone: Path, number: signal.Signals
) -> None:
    """A terminal's Ctrl-C and a scheduler signal the group; a second signal would cut the saving short."""
    launch("setup")
    command = ["bash", "launch.sh", "local", "-n", "2", "experiments.stub", "saves"]
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    options["preexec_fn"] = lambda: signal.signal(number, signal.SIG_DFL)  # a job in the background ignores SIGINT
    with subprocess.Popen(command, cwd=clone, env=environment(clone), **options) as process:
        limit = time.monotonic() + 200
        while not all((clone / f"started{rank}").exists() for rank in (0, 1)) and time.monotonic() < limit:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 75
    assert sorted(said.splitlines()) == ["told 0", "told 1"]


def test_a_process_that_is_killed_is_one_line_and_75_whatever_the_others_say(launch: Launch) -> None:
    done = launch("local", "-n", "2", "experiments.stub", "dies")
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1].startswith("launch: signal 9 ended a process")


def test_test_hands_its_arguments_to_pytest(launch: Launch) -> None:
    line = words(launch("test", "--dry-run", "-k", "a or b"))[-1]
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    assert line == ["exec", ".venv/bin/python", "-m", "pytest", *workers, "-k", "a or b"]


TOOL = """#!/bin/sh
if [ "$1" = --version ]; then echo "${0##*/} 1.2.3 (compiled: yes)"; exit; fi
echo "${0##*/} $*" >>calls
[ ! -e "bad_${0##*/}" ]
"""
TREE = (
    *("fm_jax/hub/language/t5.py", "fm_jax/hub/names.py", "fm_jax/data/images/boxes.py", "fm_jax/models/vision/vit.py"),
    *("experiments/vision/mae.py", "tests/hub/language/test_t5.py", "tests/data/test_boxes.py", "tests/hub/forms.py"),
    *("tests/experiments/test_all.py", "tests/models/test_vit.py", "tests/conftest.py", "tests/old/test_old.py"),
    *("README.md", "picture.png"),
)


@pytest.fixture
def repository(clone: Path) -> Path:
    """A clone on branch `work`, all of which is on main, with ruff and mypy as .lock/dev.txt has them."""
    for name in TREE:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    (clone / ".gitignore").write_text(".venv*\ncalls\npython\nbad_*\n")
    (clone / ".lock/dev.txt").write_text("ruff==1.2.3 \\\nmypy==1.2.3 \\\n")
    for words in ("init -q -b main", "add -A", "commit -qm whole", "checkout -qb work"):
        git(clone, *words.split())
    return clone


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True)


def install(repository: Path) -> None:
    for name in ("ruff", "mypy"):
        (repository / ".venv/bin" / name).write_text(TOOL)
        (repository / ".venv/bin" / name).chmod(0o755)


def checked(launch: Launch) -> list[str]:
    first, *rest = words(launch("check", "--dry-run"))[-1][4:]
    assert first == "tests/test_floors.py"
    return rest


TESTS_OF = {
    "fm_jax/hub/language/t5.py": ["tests/hub/language/test_t5.py"],
    "fm_jax/hub/names.py": ["tests/hub"],  # it has no test of its own
    "fm_jax/data/images/boxes.py": ["tests/data/test_boxes.py"],
    "fm_jax/models/vision/vit.py": ["tests/models/test_vit.py", "tests/test_every_model.py"],
    "experiments/vision/mae.py": ["tests/experiments"],
    "tests/hub/forms.py": ["tests/hub"],
    "tests/conftest.py": ["tests"],
    "README.md": ["tests/test_readme.py"],
    "launch.sh": ["tests/test_launch.py"],
    "picture.png": [],
}


def test_check_finds_the_tests_of_what_changed(launch: Launch, repository: Path) -> None:
    assert checked(launch) == []
    for name, tests in TESTS_OF.items():
        before = (repository / name).read_text()
        (repository / name).write_text(f"{before}\n# changed\n")
        assert checked(launch) == tests, name
        (repository / name).write_text(before)


def test_check_sees_what_the_branch_committed_and_what_git_does_not_know_yet(launch: Launch, repository: Path) -> None:
    (repository / "tests/hub/language/test_t5.py").write_text("# changed")
    git(repository, "commit", "-qam", "a change")
    assert checked(launch) == ["tests/hub/language/test_t5.py"]
    (repository / "tests/hub/test_new.py").touch()
    assert checked(launch) == ["tests/hub/language/test_t5.py", "tests/hub/test_new.py"]


def test_check_does_not_run_a_test_that_is_gone(launch: Launch, repository: Path) -> None:
    (repository / "tests/old/test_old.py").unlink()
    assert checked(launch) == []


def test_check_stops_at_the_first_complaint(launch: Launch, repository: Path) -> None:
    assert launch("setup").returncode == 0
    install(repository)
    (repository / "bad_ruff").touch()
    (repository / "calls").write_text("")
    assert launch("check").returncode == 1
    assert (repository / "calls").read_text() == "ruff check .\n"
    (repository / "bad_ruff").unlink()
    (repository / "bad_mypy").touch()
    (repository / "calls").write_text("")
    assert launch("check").returncode == 1
    assert (repository / "calls").read_text().splitlines() == ["ruff check .", "ruff format --check .", "mypy "]


def test_check_installs_ruff_and_mypy_only_where_the_locked_versions_are_missing(
    launch: Launch, repository: Path
) -> None:
    def installs() -> list[list[str]]:
        return [line for line in words(launch("check", "--dry-run")) if "pip" in line]

    assert launch("setup").returncode == 0
    (line,) = installs()
    assert {"--require-hashes", "requirements.lock", ".lock/dev.txt"} < set(line)
    install(repository)
    assert installs() == []
    (repository / ".lock/dev.txt").write_text("ruff==1.2.3 \\\nmypy==1.2.4 \\\n")
    assert installs() == [line]


def test_check_outside_a_repository_says_so_and_makes_nothing(launch: Launch, clone: Path) -> None:
    done = launch("check", GIT_CEILING_DIRECTORIES=str(clone.parent))
    assert done.returncode == 2
    assert "git" in done.stderr.splitlines()[-1]
    assert not (clone / "calls").exists()


def test_nothing_is_installed_without_a_hash_or_with_a_build_of_its_own(launch: Launch) -> None:
    installs = [line for line in words(launch("setup", "--dry-run", FM_EXTRA="cuda12")) if "pip" in line]
    first, locked, own = installs
    assert "--require-hashes" in first
    assert ".lock/build.txt" in first
    assert {"--require-hashes", "--no-build-isolation"} < set(locked)
    assert {"--requirement=requirements.lock", "--requirement=.lock/cuda12.txt"} < set(locked)
    assert {"--no-deps", "--no-build-isolation", "-e"} < set(own)


def test_a_second_run_installs_nothing_until_the_lock_changes(launch: Launch, clone: Path) -> None:
    def calls_after(**extra: str) -> int:
        assert launch("setup", **extra).returncode == 0
        return len((clone / "calls").read_text().splitlines())

    once = calls_after()
    assert calls_after() == once
    (clone / "requirements.lock").write_text("another lock")
    assert calls_after() == 2 * once
    assert calls_after(FM_EXTRA="cuda12") == 3 * once
    (clone / ".venv/bin/python").unlink()
    assert calls_after(FM_EXTRA="cuda12") == 4 * once


def test_a_half_made_environment_is_made_again(launch: Launch, clone: Path) -> None:
    (clone / "broken_index").touch()
    done = launch("local", "experiments.stub")
    assert done.returncode == 5
    assert "setup failed" in done.stderr
    assert not done.stdout
    (clone / ".venv/left_over").touch()
    (clone / "broken_index").unlink()
    assert launch("local", "experiments.stub").stdout == "0 None []\n"
    assert not (clone / ".venv/left_over").exists()


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("580.65.06, 9.0\n580.65.06, 9.0", "cuda13"),
        ("590.10, 7.5", "cuda13"),
        ("580.65.06, 9.0\n580.65.06, 7.0", "cuda12"),
        ("535.104.05, 8.0", "cuda12"),
        ("470.57.02, 8.0", "cpu"),
    ],
)
def test_the_driver_and_the_oldest_gpu_pick_the_wheels(launch: Launch, clone: Path, gpus: str, expected: str) -> None:
    stub = clone / "bin/nvidia-smi"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\necho '{gpus}'\n")
    stub.chmod(0o755)
    done = launch("setup", "--dry-run", FM_EXTRA="", PATH=f"{stub.parent}:{os.environ['PATH']}")
    assert f"creating .venv ({expected})" in done.stderr
    assert ("older than 525" in done.stderr) == (expected == "cpu")


def test_gpu_settings_stand_beside_the_users_own(launch: Launch) -> None:
    flag = "--xla_gpu_enable_latency_hiding_scheduler"
    run = ("local", "--dry-run", "experiments.stub")
    plain = words(launch(*run, FM_EXTRA="cuda12"))[-1]
    assert {f"XLA_FLAGS={flag}=true", "XLA_PYTHON_CLIENT_MEM_FRACTION=.9"} < set(plain)
    mine = words(launch(*run, FM_EXTRA="cuda12", XLA_FLAGS="--a=b", XLA_PYTHON_CLIENT_MEM_FRACTION=".5"))[-1]
    assert {f"XLA_FLAGS=--a=b {flag}=true", "XLA_PYTHON_CLIENT_MEM_FRACTION=.5"} < set(mine)
    refused = words(launch(*run, FM_EXTRA="cuda12", XLA_FLAGS=f"{flag}=false"))[-1]
    assert not any(word.startswith("XLA_FLAGS=") for word in refused)


def test_slurm_prints_a_job_that_runs_the_same_command(launch: Launch, clone: Path) -> None:
    done = launch("slurm", "--dry-run", "--nodes=2", "--time=1:00:00", "experiments.stub", "--text", "two words")
    assert done.returncode == 0
    *job, submit = done.stdout.splitlines()
    assert shlex.split(submit) == ["sbatch", "--nodes=2", "--time=1:00:00", "runs/slurm/stub.sbatch"]
    command = next(line for line in job if line.startswith("run=("))
    shown = subprocess.run(["bash", "-c", f'{command}; printf "%s|" "${{run[@]}}"'], capture_output=True, text=True)
    assert shown.stdout == "./launch.sh|local|experiments.stub|--text|two words|"
    assert subprocess.run(["bash", "-n"], input="\n".join(job), text=True).returncode == 0
    assert any("srun --kill-on-bad-exit=1" in line for line in job)
    assert any("scontrol requeue" in line for line in job)
    assert not (clone / "runs").exists()


def test_tpu_copies_the_clone_and_starts_every_worker(launch: Launch, clone: Path) -> None:
    done = launch("tpu", "--dry-run", "pod", "--zone=here", "experiments.stub", "--text", "two words")
    copy, start = words(done)[-2:]
    for line, verb in ((copy, "scp"), (start, "ssh")):
        assert line[:5] == ["gcloud", "compute", "tpus", "tpu-vm", verb]
        assert {"--worker=all", "--zone=here"} < set(line)
    assert copy[-1] == "pod:fm_jax.tgz"
    assert shlex.split(start[-1])[-5:] == ["./launch.sh", "local", "experiments.stub", "--text", "two words"]
    assert not (clone / "runs").exists()


def test_k8s_renders_an_indexed_job(launch: Launch) -> None:
    options = ("--name=train", "--image=place/fm:1", "--nodes=4", "--gpus=8")
    done = launch("k8s", "--dry-run", *options, "experiments.stub", "--text", "two 'words' \"more\"")
    assert done.returncode == 0, done.stderr
    service, job = yaml.safe_load_all(done.stdout)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert container["image"] == "place/fm:1"
    assert container["command"] == ["./launch.sh", "local", "experiments.stub", "--text", "two 'words' \"more\""]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["FM_NUM_PROCESSES"] == "4"
    assert env["FM_EXTRA"] == "cpu"
    # Process 0 is found by name: pod train-0 below the headless service of the same name.
    assert env["FM_COORDINATOR_ADDRESS"].startswith(f"train-0.{service['metadata']['name']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


def test_k8s_passes_words_on_as_they_are(launch: Launch) -> None:
    """Kubernetes reads $(NAME) as a variable and $$ as a dollar sign."""
    done = launch("k8s", "--dry-run", "experiments.stub", "--text", "$(FM_EXTRA) $$ $x")
    _, job = yaml.safe_load_all(done.stdout)
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "$$(FM_EXTRA) $$$$ $$x"
    done = launch("k8s", "--dry-run", "experiments.stub", FM_EXTRA='cuda"}, {name: X')
    assert (done.returncode, done.stdout) == (2, "")
    assert "FM_EXTRA" in done.stderr


def test_the_locks_pin_and_hash_everything_and_name_no_host() -> None:
    base = pinned(ROOT / "requirements.lock")
    assert {"jax", "flax", "setuptools", "pytest", "matplotlib"} <= base
    for delta in sorted((ROOT / ".lock").glob("*.txt")):
        names = pinned(delta)
        assert names == {"setuptools"} if delta.stem == "build" else names and not names & base, delta


def pinned(lock: Path) -> set[str]:
    text = lock.read_text()
    assert "://" not in text
    entries = text.replace("\\\n", " ").splitlines()
    entries = [entry for entry in entries if not entry.startswith("#")]
    assert all("==" in entry.split(";")[0] and "--hash=sha256:" in entry for entry in entries)
    return {entry.split("==")[0] for entry in entries}
