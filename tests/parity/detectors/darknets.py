"""What YOLOv3 is compared on: Darknet's cfg files as libreyolo builds them, whole, narrow, small; and both answers."""

import re
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.core import statistics, tree
from fm_jax.models.vision.yolov3 import decode
from tests.hub.darknet_files import CLASSES, NETWORKS, sections, text
from tests.parity.detectors.libreyolo_peer import imported
from tests.parity.distances import steepest

ROWS = 2
# name -> (cfg, divisor of every width, classes, (height, width))
CASES = {
    "yolov3": ("yolov3", 1, 80, (64, 96)),
    "yolov3-tiny": ("yolov3-tiny", 1, 80, (96, 64)),
    "narrow": ("yolov3", 16, 3, (64, 96)),
    "narrow-spp": ("yolov3-spp", 32, 4, (128, 96)),
    "narrow-tiny": ("yolov3-tiny", 16, 3, (96, 64)),
}
SMALL = {f"small-{name}": name for name in NETWORKS}  # case -> network of tests/hub/darknet_files.py
CASES |= dict.fromkeys(SMALL, ("", 1, CLASSES, (16, 24)))
NARROW = tuple(case for case in CASES if case.startswith("narrow"))


def cfg_text(case: str) -> str:
    """Return the .cfg of a case: a published one, with every width divided and other classes, or a small one."""
    if case in SMALL:
        return text(sections(NETWORKS[SMALL[case]]))
    name, divisor, classes, (height, width) = CASES[case]
    cfg = imported("models.darknet.cfg").bundled_cfg_path(name).read_text()
    cfg = re.sub(r"filters=(\d+)", lambda found: f"filters={max(1, int(found[1]) // divisor)}", cfg)
    cfg = re.sub(rf"filters={255 // divisor}(?=\s+activation=linear)", f"filters={3 * (5 + classes)}", cfg)
    cfg = re.sub(r"classes=80", f"classes={classes}", cfg)
    return re.sub(r"height=\d+", f"height={height}", re.sub(r"width=\d+", f"width={width}", cfg))


def images(case: str) -> np.ndarray:
    """Return images [B, H, W, 3] in [0, 1] with slow and fast changes."""
    height, width = CASES[case][3]
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:height, :width]
    turns = rng.normal(0, 0.3, (2, ROWS, 1, 1, 3))
    waves = np.sin(rows[None, :, :, None] * turns[0] + columns[None, :, :, None] * turns[1])
    return (0.5 + 0.3 * waves + 0.2 * rng.uniform(-1, 1, (ROWS, height, width, 3))).astype(np.float32)


def peer(case: str) -> Any:
    """Return libreyolo's network with every tensor drawn anew; see `draw`."""
    net = imported("models.darknet.net").DarknetNet(*imported("models.darknet.cfg").parse_cfg_text(cfg_text(case)))
    return draw(net.eval())


def draw(net: Any, seed: int = 0) -> Any:
    """Draw every tensor anew, so that none is 0 or 1.

    Running variances are between 1e-6 and 1, and kernels are as small as their square roots: where an epsilon of 1e-6
    is added, and to what, then matters, and activations still have a deviation near 1. What is added to a residual is
    smaller. Values are rounded to float16.
    """
    import torch

    rng = np.random.default_rng(seed)

    def put(tensor: Any, values: np.ndarray) -> None:
        tensor.copy_(torch.from_numpy(values.astype(np.float16).astype(np.float32)))

    with torch.no_grad():
        for number, layer in enumerate(net.layers):
            if not hasattr(layer, "conv"):
                continue
            added = isinstance(net.layers[number + 1], torch.nn.Identity) and layer.bn is not None  # to a residual
            shape = tuple(layer.conv.weight.shape)
            spread = np.ones(shape[0])
            if layer.bn is not None:
                variance = 10 ** rng.uniform(-6, 0, shape[0])
                spread = np.sqrt(variance)
                put(layer.bn.running_var, variance)
                put(layer.bn.running_mean, rng.normal(0, 0.3, shape[0]) * spread)
                put(layer.bn.weight, rng.normal(1, 0.3, shape[0]) * (0.3 if added else 1))
                put(layer.bn.bias, rng.normal(0, 0.3, shape[0]))
            else:
                put(layer.conv.bias, rng.normal(0, 0.3, shape[0]))
            kernel = rng.normal(0, (1.2 / np.prod(shape[1:])) ** 0.5, shape)
            put(layer.conv.weight, kernel * spread[:, None, None, None])
    return net


def tensors(net: Any, *, gradient: bool = False) -> dict[str, np.ndarray]:
    """Return the peer's tensors, or the gradients of them, in the order of a .weights and under the hub's names.

    The gradients of running statistics are zeros.
    """
    found = {}
    for number, layer in enumerate(net.layers):
        if not hasattr(layer, "conv"):
            continue
        parts = {"weights": layer.conv.weight}
        if layer.bn is None:
            parts = {"biases": layer.conv.bias, **parts}
        else:
            norm = layer.bn
            parts = {
                "biases": norm.bias, "scales": norm.weight, "rolling_mean": norm.running_mean,
                "rolling_variance": norm.running_var, **parts,
            }  # fmt: skip
        for word, tensor in parts.items():
            slope = getattr(tensor, "grad", None)
            value = tensor.detach().numpy() if not gradient else slope.numpy() if slope is not None else None
            found[f"{number}.{word}"] = np.zeros(tuple(tensor.shape), np.float32) if value is None else value.copy()
    return found


def weights_file(net: Any, seen: int = 32_013_312) -> bytes:
    """Return the bytes of a .weights of version 0.2, by the format alone."""
    numbers = b"".join(array.astype("<f4").tobytes() for array in tensors(net).values())
    return struct.pack("<iiiQ", 0, 2, 0, seen) + numbers


def readouts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return what the outputs are multiplied by before they are added up, to have something to differentiate."""
    rng = np.random.default_rng(2)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def theirs(case: str, net: Any) -> dict[str, Any]:
    """Return the peer's raw and decoded outputs in our order, and the gradients of a readout of the raw ones."""
    import torch

    decoder = imported("postprocess.darknet_yolo")
    raw = net(torch.from_numpy(images(case).transpose(0, 3, 1, 2).copy()))
    classes = CASES[case][2]
    heads = [out.unflatten(1, (-1, 5 + classes)).permute(0, 3, 4, 1, 2).flatten(1, 3) for out in raw]
    joined = torch.cat(heads, dim=1)  # scale, row, column, anchor: [B, N, 5 + K]
    outputs = {"boxes": joined[..., :4], "objectness": joined[..., 4], "classes": joined[..., 5:]}
    factors = readouts({name: tuple(out.shape) for name, out in outputs.items()})
    sum((out * torch.from_numpy(factors[name])).sum() for name, out in outputs.items()).backward()
    anchors = [torch.tensor(spec.anchors, dtype=torch.float32) for spec in net.detections]
    decoded = []
    for out, spec, pairs in zip(raw, net.detections, anchors, strict=True):
        found = decoder.decode_export([out.detach()], [spec], [pairs])  # [B, 4 + K, anchor, row, column]
        found = found.unflatten(2, (len(pairs), *out.shape[2:]))
        decoded.append(found.permute(0, 3, 4, 2, 1).flatten(1, 3))
    whole = torch.cat(decoded, dim=1).numpy()
    found = {name: out.detach().numpy() for name, out in outputs.items()}
    found |= {"decoded": whole[..., :4], "scores": whole[..., 4:]}
    return {"outputs": found, "gradients": tensors(net, gradient=True)}


def ours(model: Any, image: np.ndarray) -> Any:
    """Return a jitted params -> our answer."""
    image = jnp.asarray(image)

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        trained, running = statistics.split(params)

        def score(trained: Any) -> tuple[jax.Array, Any]:
            found = model.apply({"params": tree.merge(trained, running)}, image)
            factors = readouts({name: out.shape for name, out in found._asdict().items()})
            return sum((out * factors[name]).sum() for name, out in found._asdict().items()), found  # type: ignore[return-value]

        (_, found), gradients = jax.value_and_grad(score, has_aux=True)(trained)
        boxes, scores = decode(model.cfg, found, image.shape[1:3])
        return {"outputs": {**found._asdict(), "decoded": boxes, "scores": scores}, "gradients": gradients}

    return compute


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences of all outputs, in standard deviations of the peer's, and of the gradients if any.

    Decoded boxes are measured by the largest coordinate: the exponential magnifies an error as it does the side.
    """
    found = {}
    for name, want in peer["outputs"].items():
        unit = np.abs(want).max() if name == "decoded" else want.std()
        found[name] = float(np.abs(np.asarray(mine["outputs"][name]) - want).max() / unit)
    return found | {name: steepest(mine[name], gradients) for name, gradients in peer.items() if name == "gradients"}
