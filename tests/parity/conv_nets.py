"""What convolutional classifiers are compared on, and how both sides answer, in training too."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core import statistics, tree
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.objectives.classify import softmax

CLASSES, ROWS = 5, 4
INSIDES = ()  # no padding


def images(size: tuple[int, int], channels: int = 3) -> dict[str, np.ndarray]:
    """Return images [B, H, W, channels] with slow and fast changes, and their labels."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[: size[0], : size[1]]
    turns = rng.normal(0, 0.3, (2, ROWS, 1, 1, channels))
    waves = np.sin(rows[None, :, :, None] * turns[0] + columns[None, :, :, None] * turns[1])
    image = (waves + rng.normal(0, 0.7, (ROWS, *size, channels))).astype(np.float32)
    label = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    return {"image": image, "label": label, "weights": np.ones(ROWS, np.float32)}


def build(stem: str, options: Mapping[str, Any], *, moved: bool) -> Any:
    """Return the peer in evaluation mode, freshly initialised or with every tensor drawn anew."""
    import torch
    import transformers

    torch.manual_seed(0)
    cfg = getattr(transformers, f"{stem}Config")(**options, num_labels=CLASSES)
    cfg.architectures = [f"{stem}ForImageClassification"]
    model = getattr(transformers, f"{stem}ForImageClassification")(cfg).eval()
    return draw(model) if moved else model


def draw(model: Any, seed: int = 0) -> Any:
    """Draw every tensor anew, so that none is 0 or 1: running variances in 0.5 … 2, the others about their start.

    Values are rounded to float16, so that a golden file may hold them in two bytes each.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(tensors(model, copied=False).items()):
            if name.endswith("running_var"):
                new = rng.uniform(0.5, 2, tensor.shape)
            elif tensor.ndim > 1:
                new = rng.normal(0, (1.5 / tensor[0].numel()) ** 0.5, tensor.shape)
            else:  # a norm's scale is the only vector called weight
                new = rng.normal(float(name.endswith("weight")), 0.3, tensor.shape)
            tensor.copy_(torch.from_numpy(new.astype(np.float16).astype(np.float32)))
    return model


def tensors(model: Any, *, copied: bool = True) -> dict[str, Any]:
    """Return the peer's weights and running moments by name; torch's counters of batches are none."""
    found = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    return {name: tensor.numpy().copy() for name, tensor in found.items()} if copied else found


def theirs(fields: Mapping[str, np.ndarray], model: Any, *, train: bool = False) -> dict[str, Any]:
    """Return the peer's answer: logits, sites, loss, gradients by name and, in training, tensors after the step.

    The running moments among the gradients are zeros.
    """
    import torch

    model = copy.deepcopy(model)
    model.train(train)
    last: list[Any] = []
    hook = model.base_model.encoder.register_forward_hook(lambda _, __, out: last.append(out.last_hidden_state))
    image = torch.from_numpy(fields["image"].transpose(0, 3, 1, 2).copy())
    out = model(image, labels=torch.from_numpy(fields["label"]).long(), output_hidden_states=True)
    out.loss.backward()
    hook.remove()
    maps = _stages(model, out.hidden_states)
    sites = {"embed": maps[0], **{f"conv.stage{n}": found for n, found in enumerate(maps[1:], 1)}, "final": last[0]}
    zeros = {key: np.zeros_like(tensor) for key, tensor in tensors(model).items()}
    slopes = {key: parameter.grad.numpy().copy() for key, parameter in model.named_parameters()}
    return {
        "outputs": {"logits": out.logits.detach().numpy()},
        "states": {key: found.detach().numpy().transpose(0, 2, 3, 1)[None] for key, found in sites.items()},
        "loss": out.loss.item(),
        "gradients": zeros | slopes,
        "after": tensors(model),
    }


def _stages(model: Any, states: tuple[Any, ...]) -> list[Any]:
    """Return the stem's output and that of each stage's last block."""
    cfg = model.config
    if cfg.model_type == "resnet":
        return list(states)
    ends = np.cumsum([int(np.ceil(cfg.depth_coefficient * repeats)) for repeats in cfg.num_block_repeats])
    return [states[end] for end in (0, *ends)]


def ours(model: Any, rows: Mapping[str, np.ndarray], *, train: bool = False) -> Any:
    """Return a jitted params -> our answer: in training the next running statistics instead of sites."""
    fields = {name: jnp.asarray(field) for name, field in rows.items()}
    loss_fn, rng = softmax(model.apply, ("image",)), jax.random.key(0) if train else None

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        trained, running = statistics.split(params)

        def mean(trained: Any) -> tuple[jax.Array, Any]:
            found = loss_fn(tree.merge(trained, running), fields, rng, None)
            return found.sum / found.weight, found.updates

        (loss, updates), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        moved = {name: value for name, (value, _) in updates.items()}
        if train:
            logits, _ = model.apply({"params": params}, fields["image"], mutable=["statistics"])
            return {"outputs": {"logits": logits}, "loss": loss, "gradients": gradients, "statistics": moved}
        logits, sites = capture.apply(model, params, fields["image"], tap=Tap(read=model.sites))
        states = {name: site[None] for name, site in sites.items()}
        return {"outputs": {"logits": logits}, "states": states, "loss": loss, "gradients": gradients}

    return compute


def turned(kernel: Any) -> Any:
    """Swap height and width of a kernel, and leave what is none."""
    return kernel.swapaxes(0, 1) if kernel.ndim == 4 else kernel
