"""T5 and mT5: a tiny config.json of every form, and what live torch is compared on."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.objectives.seq2seq import seq2seq
from fm_jax.ops.positions import Buckets
from tests.parity import torch_models
from tests.parity.changes import change, edit, part, swap, turned


def _t5(kind="t5", stem="T5", **more):
    return {
        "model_type": kind, "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "is_encoder_decoder": True,
        "architectures": [f"{stem}ForConditionalGeneration"], **more,
    }  # fmt: skip


FORMS = {
    "t5": _t5(),
    "t5-v1.1": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _t5("mt5", "MT5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}  # fmt: skip

FEW = ("t5",)  # one of each way of naming and storing

VOCAB, WIDTH = 40, 16
SOURCE, TIME = 24, 21  # beyond the 16 tokens where the small buckets end
SOURCES, TARGETS = (24, 13, 5), (21, 9, 4)  # real tokens of each row
TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU: ten times what was measured
INSIDES = tuple(np.arange(time) < np.array(lengths)[:, None] for time, lengths in ((SOURCE, SOURCES), (TIME, TARGETS)))

_small = {
    "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip

# name -> (family, options, whether the head is set free from the token table)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "t5": ("T5", _small, False),
    "t5-uneven": ("T5", {**_small, "num_layers": 1, "num_decoder_layers": 3, "d_kv": 4, "num_heads": 4}, False),
    "t5-usual-buckets": (
        "T5", {**_small, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}, False
    ),
    "v1.1": ("T5", {**_small, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    # what transformers 5 makes of such a config where no file brings a head
    "v1.1-tied": ("T5", {**_small, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, False),
    "mt5": ("MT5", {**_small, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}, True),
}  # fmt: skip

tensors = torch_models.tensors


def peer(name: str, *, moved: bool = True) -> Any:
    """Return the peer in evaluation mode, freshly initialised or moved."""
    import torch
    import transformers

    family, options, free = CASES[name]
    torch.manual_seed(0)
    cfg = getattr(transformers, f"{family}Config")(**options, decoder_start_token_id=0)
    cfg._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(cfg).eval()
    if free:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
        model.config.tie_word_embeddings = False
    return torch_models.perturb(model) if moved else model


def batch(_: str) -> dict[str, np.ndarray]:
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


def sources() -> dict[str, Any]:
    """Return the peer's view of the sources: padded with 0, and masked."""
    import torch

    rows = batch("t5")
    inside = np.arange(SOURCE) < rows["source_length"][:, None]
    return {
        "input_ids": torch.from_numpy(np.where(inside, rows["source"], 0).astype(np.int64)),
        "attention_mask": torch.from_numpy(inside.astype(np.int64)),
    }


def theirs(name: str, model: Any) -> dict[str, Any]:
    """Return the peer's answer: logits, both stacks' states [1 + L + 1, B, T, D], loss, gradients by name."""
    import torch

    rows = batch(name)
    labels = torch.from_numpy(np.where(rows["weights"] > 0, rows["targets"], -100).astype(np.int64))
    stacks = ([*stack.block, stack.final_layer_norm] for stack in (model.encoder, model.decoder))
    model.zero_grad()
    with torch_models.watched(next(stacks)) as encoder, torch_models.watched(next(stacks)) as decoder:
        out = model(**sources(), labels=labels, use_cache=False)
    out.loss.backward()
    return {
        "outputs": {"logits": out.logits.detach().numpy()},
        "states": {"encoder": torch_models.stacked(encoder), "decoder": torch_models.stacked(decoder)},
        "loss": out.loss.item(),
        "gradients": torch_models.gradients(model),
    }


def ours(model: Any, rows: Mapping[str, np.ndarray]) -> Any:
    """Return a jitted params -> our answer."""
    rows = {name: jnp.asarray(field) for name, field in rows.items()}
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
        return {"outputs": {"logits": logits}, "states": states, "loss": loss, "gradients": gradients}

    return compute


# name -> (case, change of (model, params))
MUTANTS = {
    "attention scaled": ("t5", lambda m, p: (part(m, "attention", scale=0.0), p)),
    "tied head not scaled": ("t5", lambda m, p: (change(m, scale_head=False), p)),
    "own head scaled": ("v1.1", lambda m, p: (change(m, scale_head=True), p)),
    "tied head of v1.1 scaled": ("v1.1-tied", lambda m, p: (change(m, scale_head=True), p)),
    "erf instead of tanh GELU": ("v1.1", lambda m, p: (part(m, "mlp", activation="gelu"), p)),
    "gate and up swapped": ("v1.1", lambda m, p: (m, swap(p, "encoder/blocks/mlp/gate", "encoder/blocks/mlp/up"))),
    # 1e-5 moves the states by 6e-5 of their deviation: a residual stream of unit embeddings dwarfs it
    "epsilon 1e-4": ("t5", lambda m, p: (part(m, "norm", epsilon=1e-4), p)),
    "buckets of another number": ("t5", lambda m, p: (change(m, buckets=Buckets(8, 24)), p)),
    "tables of encoder and decoder swapped": ("t5", lambda m, p: (m, swap(p, "encoder/bias", "decoder/bias"))),
    "cross queries and keys swapped": ("t5", lambda m, p: (m, swap(p, "cross/q/", "cross/k/"))),
    "a square kernel not transposed": (
        "t5-uneven", lambda m, p: (m, edit(p, "encoder/blocks/attn/o/kernel", turned))
    ),
}  # fmt: skip
