"""Real weights and data for the tests marked `real`: fetched into the cache once, and skipped where that cannot be."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import fetch
from fm_jax.data.packages import client

# Each imports what it compares with at its top.
_PEERS = {"test_minilm.py": ("torch", "transformers"), "test_smollm2.py": ("torch", "transformers", "gguf")}
collect_ignore = [name for name, needed in _PEERS.items() if not all(map(find_spec, needed))]

Fetched = Callable[[str], Path]


@pytest.fixture(scope="session")
def fetched() -> Fetched:
    """Return a function from a set's name to its folder; it skips the test with the reason if the set cannot be had."""
    missing: dict[str, str] = {}

    def get(name: str) -> Path:
        if name not in missing:
            try:
                return fetch.folder(name, allow=True)
            except client.Unavailable as error:
                missing[name] = str(error)
        pytest.skip(missing[name])

    return get
