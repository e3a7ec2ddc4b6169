"""One side of a comparison: a process that prepares once and then repeats one piece of work whenever it is told to.

Each side has a process of its own. In one process ours and torch would share an allocator and its settings, each would
find the other's worker threads still spinning, and neither CPU time, page faults nor memory could be told apart. Only
one side works at a time; the others wait for a line on their input, which costs no CPU.

This file imports neither JAX nor torch, so that a side's process holds nothing of the other's.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fm_jax.core.errors import ConfigError, FmError, ResourceError

Work = Callable[[], dict[str, Any]]
"""One turn; returns what it found, as JSON data."""

Prepared = tuple[dict[str, Any], Work]
"""The facts of a preparation, as JSON data, and the work of a turn."""

# the cores are set before NumPy, JAX or torch count them
_CHILD = (
    "import os; os.sched_setaffinity(0, {2}); from experiments.benchmarks import _sides, {0}; _sides.serve({0}.{1})"
)
_FRESH = (
    "import os, time; os.sched_setaffinity(0, {2}); started = time.perf_counter(); "
    "from experiments.benchmarks import _sides, {0}; _sides.once({0}.{1}, time.perf_counter() - started)"
)
# what launch.sh sets for XLA, and no user of torch has
_OURS_ONLY = ("MALLOC_", "GLIBC_TUNABLES", "XLA_", "JAX_", "LD_PRELOAD")


@dataclass(frozen=True)
class Turn:
    """What one turn of one side took."""

    wall: float  # seconds
    user: float  # CPU seconds of all threads
    system: float
    faults: int  # pages that were mapped in without reading a file
    found: dict[str, Any]

    @property
    def cpu(self) -> float:
        """Return the CPU seconds, the program's and the kernel's for it."""
        return self.user + self.system


@dataclass(frozen=True)
class Start:
    """How to start a side: `module.function(**given)` returns a `Prepared`."""

    module: str  # of this folder: "_ours", "_torch"
    function: str
    given: Mapping[str, Any]  # JSON data

    @property
    def is_ours(self) -> bool:
        """Say whether the side is this project's code, and has the environment that launch.sh gives it."""
        return not self.module.startswith("_torch")


class Side:
    """A started side; `facts` is what its preparation found."""

    def __init__(self, name: str, start: Start, cpus: tuple[int, ...], log: Path) -> None:
        """Start the process on these cores and wait until it is prepared.

        Args:
            name: names the side in errors.
            start: what it does.
            cpus: its cores; it also gets as many threads.
            log: file for its standard error.

        Raises:
            ConfigError: one of its libraries is not installed.
            ResourceError: the process ended.
        """
        self._name, self._log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", _CHILD.format(start.module, start.function, list(cpus))]
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(start, len(cpus)),
            )
        self.facts: dict[str, Any] = self._ask(start.given)

    def turn(self) -> Turn:
        """Let the side do its work once; other errors as when it starts."""
        return Turn(**self._ask({}))

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()  # the process ends with its input
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None and answers is not None
        try:
            asked.write(json.dumps(question) + "\n")
            asked.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self) -> None:
        """Raise for a process that ended; its log says why."""
        raise failure(self._name, self._process.wait(), self._log)


def failure(name: str, status: int, log: Path) -> FmError:
    """Return the error for a side's process that ended too early; the last line of its log says why."""
    last = (log.read_text("utf-8", errors="replace").strip().splitlines() or ["it says nothing"])[-1]
    if "No module named" in last:
        return ConfigError(f"{name} cannot be measured: {last.partition(': ')[2]}; {WANTED}")
    return ResourceError(f"{name} ended with status {status}: {last[:300]} (all of it: {log})")


WANTED = (
    "install torch==2.13.0 and .[benchmarks], or use the environment that .ci/run makes for parity; or choose the peer "
    "`again`, our own side"
)


def fresh(name: str, start: Start, cpus: tuple[int, ...], log: Path) -> Turn:
    """Start a process, wait until `module.function(import_s=…, **given)` has answered, and end it.

    `wall` is from the command to the answer; CPU time and faults are those of the whole process. Errors as of `Side`.
    """
    script = _FRESH.format(start.module, start.function, list(cpus))
    command = [sys.executable, "-c", script, json.dumps(dict(start.given))]
    return watched(name, command, environment(start, len(cpus)), log, _line)


def watched(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    answer: Callable[["subprocess.Popen[str]"], dict[str, Any] | None],
) -> Turn:
    """Run a command to its end and return what it took; `wall` is until `answer(process)` returns.

    Raises:
        ConfigError: one of its libraries is not installed.
        ResourceError: it ended with an error, or `answer` returned None because it ended too early.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment))
        found = answer(process)
        wall = time.perf_counter() - started
        process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if found is None or process.returncode:
        raise failure(name, process.returncode, log)
    return Turn(
        wall,
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        after.ru_minflt - before.ru_minflt,
        found | {"whole_s": time.perf_counter() - started},
    )


def _line(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Return the first line of a process's output, JSON data."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def once(function: Callable[..., dict[str, float]], import_s: float) -> None:
    """Call a function with the command line's JSON and the seconds that its imports took; print what it returns."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _answer(answers, function(import_s=import_s, **json.loads(sys.argv[1])))


def environment(start: Start, threads: int) -> dict[str, str]:
    """Return a side's environment: as many threads for every library, on the CPU, without what is for the other."""
    given = dict(os.environ)
    if not start.is_ours:
        given = {name: value for name, value in given.items() if not name.startswith(_OURS_ONLY)}
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**given, **limits, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def serve(prepare: Callable[..., Prepared]) -> None:
    """Prepare as the first line of the input says, then take a turn for every further line until the input ends.

    Answers go to standard output, one line of JSON each; whatever else is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    facts, work = prepare(**json.loads(sys.stdin.readline()))
    _answer(answers, facts)
    for _ in sys.stdin:
        _answer(answers, timed(work))


def timed(work: Work) -> dict[str, Any]:
    """Do the work once and return the fields of a `Turn`."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = work()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
        "found": found,
    }


def resident_gb() -> float:
    """Return the most memory that this process has had, in GB, with mapped parts of files."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def _answer(answers: IO[str], data: Mapping[str, Any]) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()
