"""What the peer does in a turn: `transformers` on torch, as its users run it. Imports no JAX."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks._sides import Prepared, resident_gb

_NO_ATTENTION = ("ResNet", "EfficientNet")  # families that refuse attn_implementation


def train(folder: str, kind: str, inputs: str, *, learning_rate: float, compiled: bool = False) -> Prepared:
    """Prepare a training step.

    Args:
        folder: the checkpoint.
        kind: the class that opens it.
        inputs: file with the arguments of its forward pass.
        learning_rate: of AdamW.
        compiled: by torch.compile.
    """
    started = time.perf_counter()
    step = _step(folder, kind, inputs, learning_rate=learning_rate, compiled=compiled)
    loss, norm = step()
    first = time.perf_counter() - started
    for _ in range(2):
        step()
    facts = {"loss": loss, "grad_norm": norm, "first_step_s": round(first, 2), "resident_gb": resident_gb()}
    return facts, lambda: {"loss": step()[0]}


def first_step(folder: str, kind: str, inputs: str, *, learning_rate: float, import_s: float) -> dict[str, float]:
    """Take the first training step of a new process; return the seconds of its parts.

    `import_s` is what the imports before this call took; those of torch and transformers are added to it.
    """
    started = time.perf_counter()
    import transformers

    getattr(transformers, kind)  # transformers imports a class, and torch for it, when it is named
    imported = time.perf_counter()
    step = _step(folder, kind, inputs, learning_rate=learning_rate, compiled=False)
    ready = time.perf_counter()
    loss, _ = step()
    end = time.perf_counter()
    return {
        "import_s": import_s + imported - started,
        "model_s": ready - imported,
        "step_s": end - ready,
        "loss": loss,
    }


def _step(
    folder: str, kind: str, inputs: str, *, learning_rate: float, compiled: bool
) -> Callable[[], tuple[float, float]]:
    """Return the step: forward and backward pass, clipping at norm 1, fused AdamW; sdpa. It gives loss and norm."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    options = {} if kind.startswith(_NO_ATTENTION) else {"attn_implementation": "sdpa"}
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **options).train()
    with np.load(inputs) as stored:
        given: dict[str, Any] = {name: torch.from_numpy(stored[name]) for name in stored}
    if getattr(model.config, "use_cache", False):
        given["use_cache"] = False
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in weights if parameter.ndim > 1], "weight_decay": 0.01},
        {"params": [parameter for parameter in weights if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> tuple[float, float]:
        loss = forward(**given).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def decode(folder: str, prompts: str, *, new_tokens: int, static: bool) -> Prepared:
    """Prepare greedy generation from a file of prompts [B, T], with a dynamic or a static cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    given = torch.from_numpy(np.load(prompts)).long()
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def generate() -> Any:
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            eos_token_id=-1,  # no token: every row gets all its tokens
            pad_token_id=0,
            **options,
        )
        return made[:, given.shape[1] :]

    return {"tokens": generate().tolist(), "resident_gb": resident_gb()}, lambda: {"tokens": generate().shape[1]}


def save(folder: str, shapes: list[list[int]], seed: int) -> Prepared:
    """Prepare saves of float32 tensors of these shapes: torch.save with fsync, then torch.load."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = {str(number): torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}
    file = Path(folder) / "state.pt"
    file.parent.mkdir(parents=True, exist_ok=True)

    def turn() -> dict[str, Any]:
        started = time.perf_counter()
        with file.open("wb") as opened:
            torch.save(state, opened)
            opened.flush()
            os.fsync(opened.fileno())
        saved, started = time.perf_counter() - started, time.perf_counter()
        restored = torch.load(file, weights_only=True)
        restore, size = time.perf_counter() - started, file.stat().st_size
        same = all(torch.equal(restored[name], tensor) for name, tensor in state.items())
        file.unlink()
        return {"stall_s": saved, "total_s": saved, "restore_s": restore, "disk_bytes": size, "same": same}

    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return {"bytes": bytes_, **turn(), "resident_gb": resident_gb()}, turn
