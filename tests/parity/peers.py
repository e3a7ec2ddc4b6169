"""Tiny models of torch and transformers, what they compute, and how far ours is from it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.models.language.decoder import Decoder
from fm_jax.objectives.language import next_token
from tests.parity import convert
from tests.parity.gradients import apart, steepest

VOCAB, WIDTH, TIME, LENGTHS = 40, 16, 24, (24, 15, 6)

_gpt2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 3, "n_head": 4}
_llama = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 28, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


# 64 trained positions and 8-wide heads: with 4 turned pairs the stretched, kept and blended ones all occur
_long = {"head_dim": 8, "max_position_embeddings": 256}
_stretched = {"factor": 4.0, "original_max_position_embeddings": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _gpt2),
    "gpt2-wide-mlp-erf": ("GPT2", {**_gpt2, "n_inner": 24, "activation_function": "gelu", "n_head": 2}),
    "neo": (
        "GPTNeo",
        {
            "vocab_size": VOCAB, "max_position_embeddings": 32, "hidden_size": WIDTH, "num_layers": 4, "num_heads": 2,
            "attention_types": [[["global", "local"], 2]], "window_size": 5,
        },
    ),
    "llama": ("Llama", _llama),
    "llama-tied-full-heads": ("Llama", {**_llama, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {**_llama, **_long, **_rope("linear", factor=4.0)}),
    "llama-llama3": (
        "Llama", {**_llama, **_long, **_rope("llama3", **_stretched, low_freq_factor=1.0, high_freq_factor=4.0)}
    ),
    "llama-yarn": ("Llama", {**_llama, **_long, **_rope("yarn", **_stretched, beta_fast=8.0, beta_slow=1.0)}),
    "mistral": ("Mistral", {**_llama, "sliding_window": 5, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", _llama),
    "qwen2-mixed-windows": (
        "Qwen2",
        {**_llama, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_llama, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**_llama, "head_dim": 8, "num_key_value_heads": 1}),
}  # fmt: skip


def build(name: str) -> Any:
    """Return the peer, freshly initialised, in evaluation mode."""
    family, options = CASES[name]
    torch.manual_seed(0)
    cfg = getattr(transformers, f"{family}Config")(**options, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    cfg._attn_implementation = "eager"
    return getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(cfg).eval()


def perturb(model: Any, seed: int) -> None:
    """Move every tensor by N(0, 0.2²): at initialisation biases are 0 and gains 1, and swapping them goes unseen.

    Values are rounded to float16, so that a golden file may hold them in two bytes each.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            moved = parameter.numpy() + rng.normal(0, 0.2, parameter.shape)
            parameter.copy_(torch.from_numpy(moved.astype(np.float16).astype(np.float32)))


def batch() -> dict[str, np.ndarray]:
    """Return right-padded rows, their targets and weights."""
    rows = np.random.default_rng(1).integers(0, VOCAB, (len(LENGTHS), TIME + 1), dtype=np.int32)
    lengths = np.array(LENGTHS)[:, None]
    tokens = np.where(np.arange(TIME) < lengths, rows[:, :-1], 0).astype(np.int32)
    # the last token has no target: transformers shifts labels inside
    weights = (np.arange(TIME) < lengths - 1).astype(np.float32)
    targets = np.where(weights > 0, np.roll(tokens, -1, axis=1), 0).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "weights": weights}


def theirs(model: Any) -> dict[str, Any]:
    """Return the peer's numbers on `batch()`: logits, hidden states [1 + L, B, T, D], loss, gradients by name."""
    rows, states = batch(), []
    inside = torch.from_numpy((np.arange(TIME) < np.array(LENGTHS)[:, None]).astype(np.int64))
    tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
    stem = getattr(model, "transformer", None) or model.model
    layers = getattr(stem, "h", None) or stem.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True)]
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
    model.zero_grad()
    out = model(tokens, attention_mask=inside, labels=torch.where(inside > 0, tokens, -100), use_cache=False)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        "logits": out.logits.detach().numpy(),
        "states": torch.stack(states).detach().numpy(),
        "loss": out.loss.item(),
        "gradients": {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()},
    }


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Return the peer's weights by name, tied ones once."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def ours(cfg: Any) -> Any:
    """Return a jitted params -> the same numbers, from our decoder."""
    model = Decoder(cfg)
    rows = {name: jnp.asarray(field) for name, field in batch().items()}
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
        return {"logits": logits, "states": states, "loss": loss, "gradients": gradients}

    return compute


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences at real tokens, in units of the peer's standard deviation."""
    inside = np.arange(TIME) < np.array(LENGTHS)[:, None]
    found = {}
    for name in ("logits", "states"):
        got, want = np.asarray(mine[name])[..., inside, :], peer[name][..., inside, :]
        assert got.shape == want.shape
        deviation = want.std() if name == "logits" else want.std(axis=(-2, -1), keepdims=True)
        found[name] = float((np.abs(got - want) / deviation).max())
    found["loss"] = apart(mine["loss"], peer["loss"])
    found["gradients"] = steepest(mine["gradients"], peer["gradients"])
    return found


def in_our_terms(peer: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Rename the peer's gradients as our parameters."""
    return {**peer, "gradients": convert.params(model, peer["gradients"])}
