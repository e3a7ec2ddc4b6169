"""Tiny ResNets and EfficientNets of transformers, and what they compute on the images of `conv_task`."""

import copy
from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import conv_task
from tests.parity.conv_task import LABELS

_resnet = {"embedding_size": 8, "depths": [2, 1], "hidden_sizes": [8, 16], "layer_type": "basic"}
_narrow = {**_resnet, "hidden_sizes": [16, 32], "layer_type": "bottleneck"}
_whole = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
_part = {
    "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "kernel_sizes": [3, 5, 3],
    "in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "strides": [1, 2, 2], "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 4, 6],
}  # fmt: skip

# name -> (family, options, (height, width)). Theirs pads both axes alike, so height and width of an EfficientNet's
# images halve through even and odd sizes at the same blocks: those that `depthwise_padding` lists are odd.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "resnet-basic": ("ResNet", _resnet, (34, 48)),
    "resnet-basic-odd": ("ResNet", {**_resnet, "depths": [1, 2], "num_channels": 1}, (45, 35)),
    "resnet-bottleneck": ("ResNet", _narrow, (48, 34)),
    "resnet-v1": ("ResNet", {**_narrow, "downsample_in_bottleneck": True}, (34, 48)),
    "resnet-four-stages": (
        "ResNet", {**_resnet, "depths": [1, 2, 2, 1], "hidden_sizes": [16, 16, 24, 32], "layer_type": "bottleneck"},
        (96, 75),
    ),
    "efficientnet-even": ("EfficientNet", {**_part, "image_size": 32}, (32, 48)),
    "efficientnet-odd": ("EfficientNet", {**_part, "image_size": 42, "depthwise_padding": [1, 3]}, (42, 26)),
    "efficientnet-seven-stages": (
        "EfficientNet", {**_whole, "image_size": 42, "depthwise_padding": [1, 2, 7]}, (42, 74)
    ),
    "efficientnet-deep-wide": (
        "EfficientNet",
        {**_part, "width_coefficient": 0.7, "depth_coefficient": 1.4, "hidden_dim": 896, "image_size": 38,
         "depthwise_padding": [2], "num_channels": 1, "batch_norm_eps": 1e-2, "squeeze_expansion_ratio": 0.4},
        (22, 38),
    ),
}  # fmt: skip
RESNETS = [name for name in CASES if name.startswith("resnet")]


def build(name: str) -> Any:
    """Return the peer, freshly initialised, in evaluation mode."""
    family, options, _ = CASES[name]
    torch.manual_seed(0)
    cfg = getattr(transformers, f"{family}Config")(**options, num_labels=LABELS)
    cfg.architectures = [f"{family}ForImageClassification"]
    return getattr(transformers, f"{family}ForImageClassification")(cfg).eval()


def draw(model: Any, seed: int) -> None:
    """Draw every tensor anew, so that none is 0 or 1: running variances in 0.5 … 2, the others about their start.

    Values are rounded to float16, so that a golden file may hold them in two bytes each.
    """
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


def tensors(model: Any, *, copied: bool = True) -> dict[str, Any]:
    """Return the peer's weights and running moments by name; torch's counters of batches are none."""
    found = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    return {name: tensor.numpy().copy() for name, tensor in found.items()} if copied else found


def rows(name: str) -> dict[str, np.ndarray]:
    """Return the batch of a case."""
    _, options, size = CASES[name]
    return conv_task.batch(size, options.get("num_channels", 3))


def theirs(name: str, model: Any, *, train: bool = False) -> dict[str, Any]:
    """Return the peer's numbers: logits, sites, loss, gradients by name and, in training, tensors after the step.

    The running moments among the gradients are zeros.
    """
    model, fields = copy.deepcopy(model), rows(name)
    model.train(train)
    last: list[torch.Tensor] = []
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
        "logits": out.logits.detach().numpy(),
        "sites": {key: found.detach().numpy().transpose(0, 2, 3, 1) for key, found in sites.items()},
        "loss": out.loss.item(),
        "gradients": zeros | slopes,
        "after": tensors(model),
    }


def _stages(model: Any, states: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the stem's output and that of each stage's last block."""
    cfg = model.config
    if cfg.model_type == "resnet":
        return list(states)
    ends = np.cumsum([int(np.ceil(cfg.depth_coefficient * repeats)) for repeats in cfg.num_block_repeats])
    return [states[end] for end in (0, *ends)]
