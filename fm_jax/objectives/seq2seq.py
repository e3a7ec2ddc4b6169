"""Sequence-to-sequence loss: cross-entropy of a target text given a source text, exact under padding.

Batch fields: source [B, S] and source_length [B]; tokens [B, T], the decoder's input: a start id, then the targets
without the last (already shifted by the data pipeline); targets [B, T]; weights [B, T], 0 on padding.
"""

from collections.abc import Callable
from typing import Any

from fm_jax.core.types import LossFn
from fm_jax.objectives.language import target_tokens


def seq2seq(apply: Callable[..., Any], *, z_loss: float = 0.0, label_smoothing: float = 0.0, chunk: int = 0) -> LossFn:
    """Make the loss of an encoder-decoder's `apply`.

    Args:
        apply: `model.apply`, with the methods "hidden" and "logits".
        z_loss: weight of log(Z)²; 1e-4 in T5's pretraining.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk: number of target tokens whose logits are computed at a time; 0 for all at once.

    Returns:
        LossFn with the metrics "nll" and "accuracy", both per weighted target token.
    """
    fields = ("source", "source_length", "positions", "segments")
    return target_tokens(apply, fields, z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk)
