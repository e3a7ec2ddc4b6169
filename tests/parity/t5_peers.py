"""Tiny T5s of transformers, and what they compute."""

from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import t5_task
from tests.parity.gradients import steepest
from tests.parity.t5_task import SOURCE, VOCAB, batch

WIDTH = 16

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


def build(name: str) -> Any:
    """Return the peer, freshly initialised, in evaluation mode."""
    family, options, free = CASES[name]
    torch.manual_seed(0)
    cfg = getattr(transformers, f"{family}Config")(**options, decoder_start_token_id=0)
    cfg._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(cfg).eval()
    if free:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
        model.config.tie_word_embeddings = False
    return model


def sources() -> dict[str, torch.Tensor]:
    """Return the peer's view of the sources: padded with 0, and masked."""
    rows = batch()
    inside = np.arange(SOURCE) < rows["source_length"][:, None]
    return {
        "input_ids": torch.from_numpy(np.where(inside, rows["source"], 0).astype(np.int64)),
        "attention_mask": torch.from_numpy(inside.astype(np.int64)),
    }


def theirs(model: Any) -> dict[str, Any]:
    """Return the peer's numbers on `batch()`: logits, both stacks' states [1 + L + 1, B, T, D], loss, gradients."""
    rows, states = batch(), {"encoder": [], "decoder": []}
    hooks = []
    for side, found in states.items():
        stack = getattr(model, side)

        def before(_: Any, args: Any, kwargs: Any, found: Any = found) -> None:
            found.append(args[0])

        def after(_: Any, __: Any, out: Any, found: Any = found) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)

        hooks += [stack.block[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [module.register_forward_hook(after) for module in (*stack.block, stack.final_layer_norm)]
    model.zero_grad()
    labels = torch.from_numpy(np.where(rows["weights"] > 0, rows["targets"], -100).astype(np.int64))
    out = model(**sources(), labels=labels, use_cache=False)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        "logits": out.logits.detach().numpy(),
        **{side: torch.stack(found).detach().numpy() for side, found in states.items()},
        "loss": out.loss.item(),
        "gradients": {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()},
    }


def distances(mine: Any, peer: Any) -> dict[str, float]:
    """Return the largest differences of outputs, loss and gradients, in units of the peer's."""
    return t5_task.distances(mine, peer) | {"gradients": steepest(mine["gradients"], peer["gradients"])}
