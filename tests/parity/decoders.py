"""What all decoders are compared on, and how both sides answer."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.objectives.language import next_token
from tests.parity import torch_models

VOCAB, WIDTH, TIME, LENGTHS = 40, 16, 24, (24, 15, 6)
INSIDES = (np.arange(TIME) < np.array(LENGTHS)[:, None],)


def batch(_: str) -> dict[str, np.ndarray]:
    """Return right-padded rows, their targets and weights."""
    rows = np.random.default_rng(1).integers(0, VOCAB, (len(LENGTHS), TIME + 1), dtype=np.int32)
    lengths = np.array(LENGTHS)[:, None]
    tokens = np.where(np.arange(TIME) < lengths, rows[:, :-1], 0).astype(np.int32)
    # the last token has no target: transformers shifts labels inside
    weights = (np.arange(TIME) < lengths - 1).astype(np.float32)
    targets = np.where(weights > 0, np.roll(tokens, -1, axis=1), 0).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "weights": weights}


def build(stem: str, options: Mapping[str, Any], *, moved: bool) -> Any:
    """Return the peer in evaluation mode, freshly initialised or moved."""
    import torch
    import transformers

    torch.manual_seed(0)
    cfg = getattr(transformers, f"{stem}Config")(**options, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    cfg._attn_implementation = "eager"
    model = getattr(transformers, f"{stem}ForCausalLM" if stem != "GPT2" else "GPT2LMHeadModel")(cfg).eval()
    return torch_models.perturb(model) if moved else model


def theirs(case: str, model: Any) -> dict[str, Any]:
    """Return the peer's answer: logits, states [1 + L, B, T, D], loss, gradients by name."""
    import torch

    inside = torch.from_numpy(INSIDES[0].astype(np.int64))
    tokens = torch.from_numpy(batch(case)["tokens"].astype(np.int64))
    stem = getattr(model, "transformer", None) or model.model
    model.zero_grad()
    with torch_models.watched(getattr(stem, "h", None) or stem.layers) as states:
        out = model(tokens, attention_mask=inside, labels=torch.where(inside > 0, tokens, -100), use_cache=False)
    out.loss.backward()
    return {
        "outputs": {"logits": out.logits.detach().numpy()},
        "states": {"decoder": torch_models.stacked(states)},
        "loss": out.loss.item(),
        "gradients": torch_models.gradients(model),
    }


def ours(model: Any, rows: Mapping[str, np.ndarray]) -> Any:
    """Return a jitted params -> our answer."""
    rows = {name: jnp.asarray(field) for name, field in rows.items()}
    loss_fn = next_token(model.apply)

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        tap = Tap(read=("embed", "block.resid_post"))
        logits, read = capture.apply(model, params, rows["tokens"], tap=tap)

        def mean(params: Any) -> jax.Array:
            total, weight, *_ = loss_fn(params, rows, None)
            return total / weight

        loss, gradients = jax.value_and_grad(mean)(params)
        states = jnp.concatenate([read["embed"][None], read["block.resid_post"]])
        return {"outputs": {"logits": logits}, "states": {"decoder": states}, "loss": loss, "gradients": gradients}

    return compute


tensors = torch_models.tensors
