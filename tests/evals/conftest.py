"""What the tests of pictures share."""

import contextlib

import pytest

from fm_jax.evals import style


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every picture drawn, kept for inspection."""
    kept, picture = [], style.picture

    @contextlib.contextmanager
    def keeping(*args):
        with picture(*args) as axes:
            kept.append(axes)
            yield axes

    monkeypatch.setattr(style, "picture", keeping)
    return kept
