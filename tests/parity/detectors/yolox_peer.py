"""libreyolo's YOLOX with given weights, and its answers in our terms."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.parity.detectors.libreyolo_peer import imported
from tests.parity.vision.yolox import CLASSES, FORMS, LARGER, TERMS


def peer(form: str, weights: Mapping[str, np.ndarray]) -> Any:
    """Return libreyolo's model of a form, with the epsilon and momentum of the authors' experiments."""
    import torch

    imported("training.distributed")  # with a bare package around it
    nn = imported("models.yolox.nn")
    config = (FORMS | LARGER)[form]
    sizes: dict[str, Any] = {"width": config["width"] / 64, "depthwise": config.get("depthwise", False)}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.YOLOPAFPN(depth=config["depth"] / 3, **sizes)
            self.head = nn.YOLOXHead(CLASSES, **sizes)

    model = Model()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps, part.momentum = 1e-3, 0.03
    tensors = {name: torch.from_numpy(tensor.copy()) for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return model


def images(fields: Mapping[str, np.ndarray]) -> Any:
    """Return the images as the peer reads them: [B, 3, H, W] in blue, green, red."""
    import torch

    return torch.from_numpy(fields["images"][..., ::-1].transpose(0, 3, 1, 2).copy())


def labels(fields: Mapping[str, np.ndarray]) -> Any:
    """Return [B, M, 5]: class, centre and sides of every box, zeros for padding."""
    import torch

    low, high = fields["boxes"][..., :2], fields["boxes"][..., 2:]
    rows = np.concatenate([fields["labels"][..., None], (low + high) / 2, high - low], axis=-1)
    return torch.from_numpy((rows * fields["box_mask"][..., None]).astype(np.float32))


def decoded(model: Any, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return [B, A, 5 + C] in evaluation: centre and sides in pixels, and probabilities."""
    import torch

    model.eval().head.export = True
    with torch.no_grad():
        found: np.ndarray = model.head(model.backbone(images(fields))).numpy()
    model.head.export = False
    return found


def theirs(
    model: Any, fields: Mapping[str, np.ndarray], *, train: bool = False, double: bool = False
) -> dict[str, Any]:
    """Return the peer's answer: raw predictions, loss and its terms, gradients by name, tensors after the step.

    In evaluation only its norms are: its head computes a loss in training alone. The running moments among the
    gradients are zeros. `double` computes in float64.
    """
    import torch

    dtype = torch.float64 if double else torch.float32
    model = copy.deepcopy(model).to(dtype).train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.train(train)
    model.head.use_l1 = True
    raw: list[Any] = []
    real = model.head.get_output_and_grid

    def keeping(output: Any, *more: Any) -> Any:
        raw.append(output.detach().flatten(2).transpose(1, 2).clone())  # what follows writes into it
        return real(output, *more)

    model.head.get_output_and_grid = keeping
    pictures = images(fields).to(dtype)
    terms = model.head(model.backbone(pictures), labels=labels(fields).to(dtype), imgs=pictures)
    terms["total_loss"].backward()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("batches_tracked")}
    slopes = {name: part.grad.numpy().copy() for name, part in model.named_parameters()}
    told = {mine: terms[name] for name, mine in TERMS.items()} | {"positives": terms["num_fg"]}
    return {
        "outputs": {"raw": torch.cat(raw, dim=1).numpy()},
        "loss": terms["total_loss"].item(),
        "terms": {name: float(value.detach()) if hasattr(value, "detach") else value for name, value in told.items()},
        "gradients": {name: np.zeros(tensor.shape, np.float32) for name, tensor in state.items()} | slopes,
        "after": {name: tensor.numpy().copy() for name, tensor in state.items()},
    }


def assigned(case: Mapping[str, np.ndarray], at: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which anchor points the peer's SimOTA makes positive, for which box, and their IoU; 0 where none.

    Args:
        case: predicted boxes [A, 4], logits [A, C], objectness [A], boxes [M, 4] and labels [M] of one image, unpadded.
        at: the anchor points.
    """
    import torch

    imported("training.distributed")
    head = imported("models.yolox.nn").YOLOXHead(case["logits"].shape[1], 0.0625)
    points, count = len(case["predicted"]), len(case["boxes"])
    positive, box, iou = np.zeros(points, bool), np.zeros(points, np.int32), np.zeros(points, np.float32)
    if not count:  # the head does not ask for an image without boxes
        return positive, box, iou

    def centred(boxes: np.ndarray) -> Any:
        return torch.from_numpy(np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1))

    _, found, ious, index, _ = head.get_assignments(
        0,
        count,
        centred(case["boxes"]),
        torch.from_numpy(case["labels"]),
        centred(case["predicted"]),
        torch.from_numpy(at.stride.T.copy()),
        torch.from_numpy(at.cell[None, :, 0].copy()),
        torch.from_numpy(at.cell[None, :, 1].copy()),
        torch.from_numpy(case["logits"])[None],
        torch.from_numpy(case["objectness"])[None, :, None],
    )
    positive[:] = found.numpy()
    box[positive], iou[positive] = index.numpy(), ious.numpy()
    return positive, box, iou
