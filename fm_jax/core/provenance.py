"""What a run's numbers depend on: code, versions, machine, flags. Written to run.json; holds no secrets."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fm_jax.core.errors import ResourceError

_PACKAGES = (
    *("fm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("grain", "tensorflow-datasets", "array_record", "tokenizers", "safetensors"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
_VARIABLES = ("XLA_", "JAX_", "LIBTPU_INIT_ARGS", "NCCL_", "TF_CPP_MIN_LOG_LEVEL")


def record(
    *, experiment: str, preset: str, config: Mapping[str, Any], argv: Sequence[str], source: Path
) -> dict[str, Any]:
    """Return the entry of run.json for this start; `source` is a file or directory of the running code.

    Starts the backend. Raises ResourceError if there is no device to run on.
    """
    return {
        "experiment": experiment,
        "preset": preset,
        "config": dict(config),
        "config_sha256": fingerprint(config),
        "argv": list(argv),
        "git": git(source),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a config's JSON with sorted keys: equal configs have equal fingerprints."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()


def git(source: Path) -> dict[str, Any] | None:
    """Return {"revision", "dirty"} of the repository that contains `source`, or None outside a repository."""

    def ask(*words: str) -> str:
        directory = source if source.is_dir() else source.parent
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return {"revision": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a run's numbers."""
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def devices() -> dict[str, Any]:
    """Return kind and number of devices, and number of processes; ResourceError if the backend cannot start."""
    try:
        available = jax.devices()
    except RuntimeError as error:
        raise ResourceError(f"no device to run on: {str(error).splitlines()[0]}") from error
    return {
        "platform": available[0].platform,
        "kind": available[0].device_kind,
        "count": len(available),
        "processes": jax.process_count(),
    }
