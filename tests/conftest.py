"""Eight virtual CPU devices, quick compilation, a persistent compilation cache, and strict rank promotion."""

import gc
import importlib.util
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests run each program a few times: compiling it well costs about five times as much and buys nothing.
FLAGS = {"xla_force_host_platform_device_count": "8", "xla_backend_optimization_level": "0"}
# Newer than the oldest jaxlib or soon gone: an XLA flag that does not exist ends the process.
FLAGS_IF_KNOWN = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}


def known(flags: dict[str, str]) -> dict[str, str]:
    """Return those of the flags whose names stand in jaxlib's library."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.submodule_search_locations
    names = set()
    for library in Path(spec.submodule_search_locations[0]).glob("libjax_common*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            names |= {name for name in flags if content.find(name.encode()) >= 0}
    return {name: value for name, value in flags.items() if name in names}


def pytest_configure() -> None:
    """Set what jax reads when it is imported, then import it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    given, wanted = os.environ.get("XLA_FLAGS", ""), FLAGS | known(FLAGS_IF_KNOWN)
    more = (f"--{name}={value}" for name, value in wanted.items() if name not in given)
    os.environ["XLA_FLAGS"] = " ".join([given, *more])
    cache = Path(tempfile.gettempdir()) / f"fm_jax_tests_{os.getuid()}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    """Let go of a module's compiled programs after it: all of them together take several gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
