"""Random inputs of a model: small ones to initialise it, larger ones to compare it with transformers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Size:
    """Size of the random inputs."""

    rows: int = 1
    length: int = 1  # tokens of the longest row of text; shorter rows are padded
    pad: int = 0  # id of the padding token


class Example(NamedTuple):
    """Inputs of a module."""

    inputs: dict[str, np.ndarray]  # argument name -> array
    inside: np.ndarray | None = None  # [B, T] bool: False on padding; None for images


class Text(NamedTuple):
    """Right-padded rows of decreasing length."""

    tokens: np.ndarray  # [B, T] int32
    length: np.ndarray  # [B] int32
    inside: np.ndarray  # [B, T] bool


def text(cfg: Any, rng: np.random.Generator, size: Size) -> Text:
    """Draw rows [B, T] for a model with this config, from the whole vocabulary except the padding token."""
    time = min(size.length, cfg.max_length)
    length = np.maximum(1, time * np.arange(size.rows, 0, -1) // size.rows).astype(np.int32)
    inside = np.arange(time) < length[:, None]
    return Text(np.where(inside, ids(cfg, rng, inside.shape, size.pad), np.int32(size.pad)), length, inside)


def ids(cfg: Any, rng: np.random.Generator, shape: tuple[int, ...], pad: int) -> np.ndarray:
    """Draw int32 token ids of the given shape, from the whole vocabulary except the padding token."""
    drawn = rng.integers(0, max(1, cfg.vocab_size - 1), shape)
    return (drawn + (drawn >= pad)).astype(np.int32)


def image(rng: np.random.Generator, size: Size, height: int, width: int, channels: int) -> np.ndarray:
    """Draw images of noise [B, height, width, channels] float32."""
    return rng.normal(size=(size.rows, height, width, channels)).astype(np.float32)
