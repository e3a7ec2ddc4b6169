"""The command line of every experiment: `python -m experiments.NAME [--workdir DIR] [--config PRESET] [--key VALUE …]`.

A wrong command is refused before any computation, with a message of one line.
"""

import difflib
import errno
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax

from fm_jax.core import distributed, host_memory, provenance
from fm_jax.core.config import apply_overrides, split_argv, to_dict
from fm_jax.core.errors import ConfigError, FmError, Preempted, ResourceError, printable
from fm_jax.core.options import help_text
from fm_jax.core.workdir import claim, write_atomically
from fm_jax.train.signals import preemptible

_OWN = ("workdir", "config", "plan", "help")
_LONGEST = 400
# Faults of a disk, a permission or a limit: the user can mend them, and file and reason say it all.
_OUTSIDE = frozenset(
    getattr(errno, name)
    for name in "EACCES EPERM EROFS EFBIG EIO EMFILE ENFILE ENOTDIR EISDIR ENAMETOOLONG ELOOP ESTALE".split()
)


@dataclass(frozen=True)
class _Experiment:
    """Where `run` was defined, which names the experiment."""

    module: str
    doc: str
    source: Path

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


def main(
    run: Callable[[Any, Path], Any],
    configs: Mapping[str, Callable[[], Any]],
    *,
    resumable: Sequence[str] = (),
    unplanned: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Run an experiment from its command line: `run(cfg, workdir)`; the first of `configs` is the default.

    `resumable`: patterns of config keys (`fit.num_steps`, `log.*`) that may change when a run is resumed in its
    work directory; any other change is refused. `unplanned`: why there is no one training step to `--plan`.

    Exit status: 0 done; `FmError.code` for an error that one line explains (2 usage, 3 data, 4 checkpoint,
    5 resources, 6 numbers, 75 stopped and saved: start again); 130 interrupted; 1 a bug, with its traceback.
    `FM_DEBUG=1` shows the traceback of any error.
    """
    experiment = _experiment(run)
    try:
        with preemptible():
            _start(run, configs, resumable, unplanned, list(sys.argv[1:] if argv is None else argv), experiment)
    except KeyboardInterrupt:
        _leave(130, f"{experiment.name}: interrupted")
    except Exception as error:
        known = _explained(error)
        if known is None and not jax.distributed.is_initialized():
            raise
        if known is None or os.environ.get("FM_DEBUG") == "1":
            traceback.print_exc()
        if known is None:
            _leave(1, f"{experiment.name}: error: {type(error).__name__}, see above")
        text = " ".join(str(known).split()) or type(known).__name__
        line = f"{experiment.name}: {'stopped' if isinstance(known, Preempted) else 'error'}: {text}"
        _leave(known.code, line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…")


def _start(
    run: Callable[[Any, Path], Any],
    configs: Mapping[str, Callable[[], Any]],
    resumable: Sequence[str],
    unplanned: str,
    argv: list[str],
    experiment: _Experiment,
) -> None:
    if "--help" in argv or "-h" in argv:
        print(_help(argv, configs, experiment))
        return
    preset, cfg, workdir, plan = _resolve(argv, configs, experiment.name)
    config = to_dict(cfg)
    if plan is not None:
        if unplanned:
            raise ConfigError(f"--plan: {unplanned}")
        _plan(run, cfg, workdir, plan)
        return
    host_memory.keep_freed()
    spec = distributed.start()
    _use_compile_cache()
    with ExitStack() as stack:
        first = spec is None or (jax.process_index() if spec.process_id is None else spec.process_id) == 0
        if first:
            held = stack.enter_context(claim(workdir, experiment=experiment.module, config=config, resumable=resumable))
            for line in held.notices:
                print(f"{experiment.name}: {printable(line)}", file=sys.stderr)
            held.write_record(
                provenance.record(
                    experiment=experiment.module, preset=preset, config=config, argv=argv, source=experiment.source
                )
            )
        run(cfg, workdir)


def _plan(run: Callable[[Any, Path], Any], cfg: Any, workdir: Path, text: str) -> None:
    """Compile the training step for chips that need not be here; print what it takes and write plan.json.

    Raises:
        ConfigError: the experiment trains nothing, or the chips are unknown.
        ResourceError: the step does not fit; the message names the nearest options that fit.
    """
    from fm_jax.train.plan import search, target  # nothing else needs them

    search.check(cfg)
    jax.config.update("jax_platforms", "cpu")  # nothing is run
    report, changed, found = search.plan(run, cfg, target.resolve(text), print)
    data = report.json() | {"nearest": {"options": changed, **found.json()} if found else None}
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "plan.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    if not report.fits:
        nearest = f"the nearest setting that fits: {search.options(changed)}" if found else "no setting tried fits"
        raise ResourceError(f"--plan {text}: the step does not fit in the memory of a chip; {nearest}")


def _resolve(
    argv: Sequence[str], configs: Mapping[str, Callable[[], Any]], name: str
) -> tuple[str, Any, Path, str | None]:
    """Parse a command line into preset, config, work directory and the chips to plan for."""
    texts = split_argv(argv)
    plan = texts.pop("plan", None)
    preset = texts.pop("config", next(iter(configs)))
    workdir = os.path.expanduser(texts.pop("workdir", f"runs/{name}"))
    if preset not in configs:
        near = difflib.get_close_matches(preset, configs, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--config: {preset[:80]!r} is not one of {', '.join(configs)}{hint}")
    if not workdir or workdir.lower() in ("none", "null") or not workdir.isprintable():
        raise ConfigError(f"--workdir: {workdir[:80]!r} is not a path")
    overrides = [f"--{key}={text}" for key, text in texts.items()]
    return preset, apply_overrides(configs[preset](), overrides, also=_OWN), Path(workdir), plan


def _help(argv: Sequence[str], configs: Mapping[str, Callable[[], Any]], experiment: _Experiment) -> str:
    """Return the help page of the preset and of the sections that the command names; the rest of it is ignored."""
    words = [part for word in argv for part in word.split("=", 1)]
    given = {word.removeprefix("--"): text for word, text in itertools.pairwise(words) if word.startswith("--")}
    named = given.get("config", "")
    preset = named if named in configs else next(iter(configs))
    usage = [
        f"usage: python -m {experiment.module} [--workdir DIR] [--config PRESET] [--key VALUE …]",
        "",
        f"  --workdir DIR     directory of the run; an existing run there is resumed [runs/{experiment.name}]",
        f"  --config PRESET   {', '.join(configs)} [{next(iter(configs))}]; shown below: {preset}",
        "  --plan CHIP:SHAPE compile the step for v5e:2x4, h200:8, …: memory, collectives, time; nothing is run",
        "",
    ]
    return "\n".join(usage) + help_text(configs[preset](), experiment.doc, chosen=given)


def _experiment(run: Callable[..., Any]) -> _Experiment:
    """Read name, docstring and file from the module of `run`; under `python -m` that module is named __main__."""
    scope = getattr(run, "__globals__", {})
    file = Path(scope.get("__file__") or sys.argv[0] or "run")
    spec = scope.get("__spec__")
    module = spec.name if spec is not None else scope.get("__name__", "__main__")
    return _Experiment(file.stem if module == "__main__" else module, scope.get("__doc__") or "", file.resolve())


def _explained(error: Exception) -> FmError | None:
    """Return the error a user can fix from one line, or None for a bug."""
    if (lost := distributed.lost_peer(error)) is not None:  # whatever it broke here: a step, or a checkpoint
        return Preempted(f"lost contact with another process ({lost}); run the same command again to continue")
    if isinstance(error, FmError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left on the disk of {error.filename or 'the work directory'}")
    if isinstance(error, OSError) and error.errno in _OUTSIDE and error.filename is not None:
        return ResourceError(f"{error.filename}: {error.strerror}")
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).splitlines()[0][:200]
        return ResourceError(f"out of device memory; lower the batch size, accumulate or rematerialise ({first})")
    if isinstance(error, MemoryError):  # an image size of a hundred thousand, say
        return ResourceError(f"out of memory; lower the batch size or the size of one example ({error})")
    return None


def _leave(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    # A normal exit waits for all processes at a barrier. After an error in one process the others would not
    # reach it for minutes. A preempted run stops at the same step everywhere, so it may exit normally.
    if jax.distributed.is_initialized() and code != Preempted.code:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _use_compile_cache() -> None:
    """Keep compiled programs for the next start, in a directory that only this user can write.

    An entry is machine code that will be run, so a directory that others can write is not used.
    `JAX_COMPILATION_CACHE_DIR` wins, then `$FM_CACHE/xla`, then `$XDG_CACHE_HOME/fm_jax/xla`, `~/.cache/fm_jax/xla`.

    Every program is kept, however quickly it compiled; by default jax keeps those that took over a second. The second
    start of `lm_pretrain --config debug` took 4.1 s instead of 4.7, and 3.6 CPU-seconds instead of 4.4.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        standard = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fm_jax"
        directory = Path(os.environ.get("FM_CACHE") or standard) / "xla"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, f"{directory} belongs to another user")
        directory.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        print(f"compile cache disabled: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
