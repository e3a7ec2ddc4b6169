"""Random inputs of a model: the smallest initialise it, larger ones compare it with the same model elsewhere."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Size:
    """How much to draw."""

    rows: int = 1
    length: int = 1  # tokens of the longest row; the others are padded (of text)
    pad: int = 0  # id of the token to pad with


class Example(NamedTuple):
    """What a module is called with."""

    inputs: dict[str, np.ndarray]  # by the names of its arguments
    inside: np.ndarray | None = None  # [B, T] bool: which tokens are no padding; None of images


class Text(NamedTuple):
    """Right-padded rows of falling length."""

    tokens: np.ndarray  # [B, T] int32
    length: np.ndarray  # [B] int32
    inside: np.ndarray  # [B, T] bool


def text(cfg: Any, rng: np.random.Generator, size: Size) -> Text:
    """Draw rows that a model with this config can read, from the whole vocabulary but the pad token."""
    time = min(size.length, cfg.max_length)
    length = np.maximum(1, time * np.arange(size.rows, 0, -1) // size.rows).astype(np.int32)
    inside = np.arange(time) < length[:, None]
    return Text(np.where(inside, ids(cfg, rng, inside.shape, size.pad), np.int32(size.pad)), length, inside)


def ids(cfg: Any, rng: np.random.Generator, shape: tuple[int, ...], pad: int) -> np.ndarray:
    """Draw tokens from the whole vocabulary but the pad token: int32."""
    drawn = rng.integers(0, max(1, cfg.vocab_size - 1), shape)
    return (drawn + (drawn >= pad)).astype(np.int32)


def image(rng: np.random.Generator, size: Size, height: int, width: int, channels: int) -> np.ndarray:
    """Draw images of noise [B, height, width, channels] float32."""
    return rng.normal(size=(size.rows, height, width, channels)).astype(np.float32)
