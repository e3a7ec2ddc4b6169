"""The likelihood of a text given another, exact under padding.

Batch fields: source [B, S] and source_length [B]; tokens [B, T], which the decoder reads: the targets shifted right
behind a start id (the shift was made once, where the data was); targets [B, T]; weights [B, T], 0 on padding.
"""

from collections.abc import Callable
from typing import Any

from fm_jax.core.types import LossFn
from fm_jax.objectives.language import target_tokens


def seq2seq(apply: Callable[..., Any], *, z_loss: float = 0.0, label_smoothing: float = 0.0, chunk: int = 0) -> LossFn:
    """Make the loss of an encoder-decoder's `apply`.

    Args:
        apply: `model.apply`, with the methods "hidden" and "logits".
        z_loss: weight of log(Z)²; T5's pretraining has 1e-4.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk: target tokens whose logits exist at a time; 0 for all.

    Returns:
        LossFn whose metrics are "nll" and "accuracy", both per weighted target token.
    """
    fields = ("source", "source_length", "positions", "segments")
    return target_tokens(apply, fields, z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk)
