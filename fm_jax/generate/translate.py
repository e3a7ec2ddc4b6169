"""Text-to-text generation with an encoder-decoder: tokenise, decode greedily or by beam search, detokenise."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.core.types import Params
from fm_jax.data.text import parallel
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.generate import beam, decode
from fm_jax.layers.stack import unstacked


def translate(
    model: nn.Module,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    source_length: int,
    max_new_tokens: int,
    prefix: str = "",
    beams: beam.Config | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Return the model's output for each text, in their order.

    All batches have one shape, so one compilation serves them. Texts are sorted by length internally, so that the rows
    of a batch end at about the same step. A text's output does not depend (except for rounding) on its batch.

    Args:
        model: an encoder-decoder with `cfg.max_length` of at least max_new_tokens + 1.
        params: its parameters.
        tokenizer: the tokenizer it was trained with; its padding token starts an output, its end token ends one.
        texts: inputs; long ones are truncated.
        source_length: S, maximum tokens of an input, including the end token.
        max_new_tokens: maximum tokens of an output.
        prefix: text before every input: T5's task name.
        beams: beam search options; None decodes greedily.
        batch_size: texts per batch.

    Raises:
        ConfigError: batch_size below 1, or more tokens than the model's maximum length.
        NumericError: a probability is not finite.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    end, pad = tokenizer.end_id, tokenizer.pad_id
    read = parallel.read_side(
        tokenizer.encode_batch([prefix + text for text in texts]), source_length, end_id=end, pad_id=pad
    )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_id": end, "pad_id": pad}
    starts, ones = np.full((batch_size, 1), pad, np.int32), np.ones(batch_size, np.int32)
    order = np.argsort(read["source_length"], kind="stable")
    answers = [""] * len(texts)
    params = unstacked(params)  # once for all batches
    for first in range(0, len(texts), batch_size):
        rows = order[first : first + batch_size]
        filled = np.resize(rows, batch_size)  # the last batch repeats its rows
        context = {name: array[filled] for name, array in read.items()}
        if beams is None:
            out: Any = decode.generate(model, params, starts, ones, context=context, **options)
            tokens, lengths, sums = out.tokens, out.lengths, out.logprobs.sum(axis=-1)
        else:
            best = beam.search(model, params, starts, ones, context=context, cfg=beams, **options)
            tokens, lengths, sums = best.tokens[:, 0], best.lengths[:, 0], best.scores[:, 0]
        tokens, lengths, sums = jax.device_get((tokens, lengths, sums))
        for place, row in enumerate(rows):
            if not np.isfinite(sums[place]):
                raise NumericError(f"probabilities for {texts[row][:40]!r} are not finite; check the model's weights")
            ids = tokens[place, : lengths[place]]
            answers[row] = tokenizer.decode(ids[:-1] if len(ids) and ids[-1] == end else ids)
    return answers
