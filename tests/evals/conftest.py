"""What the tests of pictures share."""

import contextlib

import pytest

from fm_jax.evals.report import theme


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every picture drawn, kept for inspection."""
    kept, picture = [], theme.picture

    @contextlib.contextmanager
    def keeping(*args):
        with picture(*args) as axes:
            kept.append(axes)
            yield axes

    monkeypatch.setattr(theme, "picture", keeping)
    return kept
