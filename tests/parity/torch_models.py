"""What is done to a model of torch of any family: its tensors are moved, read by name, and its layers watched.

Torch is imported inside functions, so that the default tests can import the families' files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


def perturb(model: Any, seed: int = 0) -> Any:
    """Move every tensor by N(0, 0.2²): at initialisation biases are 0 and gains 1, and swapping them goes unseen.

    Values are rounded to float16, so that a golden file may hold them in two bytes each.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            moved = np.asarray(parameter.numpy() + rng.normal(0, 0.2, parameter.shape))  # of one number, not an array
            parameter.copy_(torch.from_numpy(np.asarray(moved.astype(np.float16).astype(np.float32))))
    return model


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Return the weights by name, tied ones once."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Return by name what the last `backward` left."""
    return {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


@contextmanager
def watched(layers: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield a list that gets what goes into the first layer, then what comes out of every call of any of them."""
    kept: list[Any] = []

    def before(_: Any, given: Any, __: Any) -> None:
        if not kept:  # ALBERT calls one layer again and again
            kept.append(given[0])

    def after(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def stacked(kept: Sequence[Any]) -> np.ndarray:
    """Return what was watched as one array, layers first."""
    import torch

    return torch.stack(list(kept)).detach().numpy()
