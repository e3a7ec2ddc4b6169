"""The rows that T5s are compared on, what ours makes of them, and how far that is from a peer's: no torch needed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from fm_jax.objectives.seq2seq import seq2seq
from tests.parity.gradients import apart

VOCAB = 40
SOURCE, TIME = 24, 21  # beyond the 16 tokens where the small buckets end
SOURCES, TARGETS = (24, 13, 5), (21, 9, 4)  # real tokens of each row


def batch() -> dict[str, np.ndarray]:
    """Return right-padded sources and targets; `tokens` are the targets shifted right behind a 0."""
    rng = np.random.default_rng(1)
    source = rng.integers(2, VOCAB, (len(SOURCES), SOURCE), dtype=np.int32)
    weights = (np.arange(TIME) < np.array(TARGETS)[:, None]).astype(np.float32)
    targets = np.where(weights > 0, rng.integers(2, VOCAB, weights.shape), 0).astype(np.int32)
    return {
        "source": source,  # what stands beyond a row's length is read by neither
        "source_length": np.array(SOURCES, np.int32),
        "tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "targets": targets,
        "weights": weights,
    }


def ours(model: EncoderDecoder, rows: Mapping[str, np.ndarray] | None = None) -> Any:
    """Return a jitted params -> the same numbers, from our model."""
    rows = {name: jnp.asarray(field) for name, field in (rows or batch()).items()}
    loss_fn = seq2seq(model.apply)

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        sites = ("embed", "block.resid_post", "final")
        tap = Tap(read=(*sites, *(f"encoder.{site}" for site in sites)))
        inputs = rows["tokens"], rows["source"], rows["source_length"]
        logits, read = capture.apply(model, params, *inputs, tap=tap)

        def mean(params: Any) -> jax.Array:
            total, weight, *_ = loss_fn(params, rows, None)
            return total / weight

        loss, gradients = jax.value_and_grad(mean)(params)
        states = {}
        for side, before in (("encoder", "encoder."), ("decoder", "")):
            first, blocks, last = (read[before + site] for site in sites)
            states[side] = jnp.concatenate([first[None], blocks, last[None]])
        return {"logits": logits, **states, "loss": loss, "gradients": gradients}

    return compute


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences at real tokens, in units of the peer's deviation, and the loss's."""
    found = {}
    for name, lengths in {"logits": TARGETS, "decoder": TARGETS, "encoder": SOURCES}.items():
        if name not in peer:
            continue
        inside = np.arange(peer[name].shape[-2]) < np.array(lengths)[:, None]
        got, want = np.asarray(mine[name])[..., inside, :], peer[name][..., inside, :]
        assert got.shape == want.shape
        deviation = want.std() if name == "logits" else want.std(axis=(-2, -1), keepdims=True)
        found[name] = float((np.abs(got - want) / deviation).max())
    found["loss"] = apart(mine["loss"], peer["loss"])
    return found
