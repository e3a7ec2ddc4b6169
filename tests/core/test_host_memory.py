"""Page faults of a step with large temporaries, counted in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from fm_jax.core import host_memory

# Twelve steps whose temporaries take 48 MB; huge pages are turned off, so that a machine that gives them counts alike.
STEPS = """
import ctypes, resource, sys
from statistics import median
import jax, jax.numpy as jnp
from fm_jax.core import host_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
kept = sys.argv[1] == "keep" and host_memory.keep_freed({})
def step(x):
    wide = jax.lax.optimization_barrier(jnp.tile(x, 12) + 1)
    return x + wide.reshape(12, -1).sum(0), wide.max()
compiled = jax.jit(step, donate_argnums=0).lower(jnp.ones(1 << 20)).compile()
assert compiled.memory_analysis().temp_size_in_bytes > 40e6
x, faults = jnp.ones(1 << 20), []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x, top = compiled(x)
    jax.block_until_ready((x, top))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, median(faults[4:]))
"""


def faults_per_step(choice: str) -> tuple[bool, float]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", STEPS, choice], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept == "True", float(faults)


@pytest.mark.skipif(not host_memory.is_glibc(), reason="the setting is glibc's")
def test_a_step_faults_no_pages_after_the_first_ones() -> None:
    kept, faults = faults_per_step("keep")
    assert kept
    assert faults < 100
    kept, faults = faults_per_step("as it is")
    assert not kept
    assert faults > 5000


@pytest.mark.parametrize("env", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}])
def test_a_users_own_setting_wins(env: Mapping[str, str]) -> None:
    assert not host_memory.keep_freed(env)
