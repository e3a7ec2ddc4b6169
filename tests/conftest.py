"""Eight virtual CPU devices, quick compilation, a persistent compilation cache, and strict rank promotion."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

# Tests run each program a few times: compiling it well costs about five times as much and buys nothing.
FLAGS = {"xla_force_host_platform_device_count": "8", "xla_backend_optimization_level": "0"}
# These cut compilation to a quarter again. jaxlib 0.12 lacks the first, and a flag that it lacks ends the process.
OLDER_FLAGS = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}


def pytest_configure() -> None:
    """Set what jax reads when it is imported, then import it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    older = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)
    given, wanted = os.environ.get("XLA_FLAGS", ""), FLAGS | (OLDER_FLAGS if older else {})
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
