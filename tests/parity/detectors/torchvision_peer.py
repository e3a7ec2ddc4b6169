"""torchvision beside CPU torch, whose wheels are built for CUDA: import it through `torchvision()` and nowhere else.

Its compiled operators cannot be loaded, so what it needs of them is declared here: `nms`, in torch, and the name of
`qnms`. RoIAlign falls back to torchvision's own transcription of the kernel, which must not be compiled. The kernels
read 0 where a point is more than one position outside the map, and the transcription reads the edge; that is mended.
"""

import os
import sys
from functools import cache
from typing import Any

import numpy as np

from tests.parity.vision.faster_rcnn import LOSSES, SIZE, Drawn

_OPERATORS: list[Any] = []  # a library of operators lives as long as the object that declared it


@cache
def torchvision() -> Any:
    """Import torchvision with its missing operators declared."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _OPERATORS.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")

    import torchvision as peer
    import torchvision.models.detection

    peer.ops.boxes._assert_has_ops = lambda: None
    written = sys.modules["torchvision.ops.roi_align"]
    written._bilinear_interpolate = _as_the_kernels(written._bilinear_interpolate)
    return peer


def _as_the_kernels(real: Any) -> Any:
    """Give 0 for points more than one position outside the map; the result is [K, C, rows, columns, S, S]."""

    def interpolate(maps: Any, image: Any, y: Any, x: Any, *masks: Any) -> Any:
        height, width = maps.shape[2:]
        inside = ((y >= -1) & (y <= height))[:, None, :, None, :, None] & ((x >= -1) & (x <= width))[
            :, None, None, :, None
        ]
        return real(maps, image, y, x, *masks) * inside

    return interpolate


def _nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """Keep the best box, drop what overlaps it more than the threshold, and go on with the best of the rest."""
    import torch

    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    area, left, kept = sides[:, 0] * sides[:, 1], torch.argsort(scores, descending=True, stable=True), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[left, :2], boxes[best, :2])
        high = torch.minimum(boxes[left, 2:], boxes[best, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        left = left[~(shared / (area[left] + area[best] - shared) > threshold)]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)


def faster_rcnn(cfg: dict[str, Any]) -> Any:
    """Build torchvision's model of a config.json of ours, from torchvision's own parts; images are not normalised."""
    peer = torchvision()
    detection, norms = peer.models.detection, peer.ops.misc
    norm = norms.FrozenBatchNorm2d if cfg.get("norm_frozen", True) else _batch_norm()
    eps = cfg.get("norm_eps", 1e-5)
    body = _body(cfg, lambda width: norm(width, eps=eps))
    pool = peer.ops.MultiScaleRoIAlign(
        list("0123456789"[: len(cfg["depths"])]), cfg["output_size"], cfg.get("sampling_ratio", 2),
        canonical_scale=cfg["canonical_scale"],
    )  # fmt: skip
    width, hidden = cfg["out_channels"], cfg["representation_size"]
    sizes = tuple((size,) for size in cfg["anchor_sizes"])
    ratios = (tuple(cfg.get("aspect_ratios", (0.5, 1.0, 2.0))),) * len(sizes)
    plain = ("rpn_pre_nms_top_n", "rpn_post_nms_top_n", "rpn_nms_thresh", "box_score_thresh", "box_nms_thresh")
    options = {key: cfg[key] for key in cfg if key.startswith((*plain, "box_detections"))}
    found = detection.FasterRCNN(
        body,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(sizes, ratios),
        box_roi_pool=pool,
        box_head=detection.faster_rcnn.TwoMLPHead(width * cfg["output_size"] ** 2, hidden),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(hidden, cfg["num_classes"]),
        image_mean=[0.0] * cfg.get("num_channels", 3),
        image_std=[1.0] * cfg.get("num_channels", 3),
        min_size=SIZE[0],
        max_size=SIZE[1],
        **options,
    )
    return found.eval()


def _batch_norm() -> Any:
    import torch

    return torch.nn.BatchNorm2d


def _body(cfg: dict[str, Any], norm: Any) -> Any:
    """Build the ResNet and the pyramid; torchvision's own ResNet has no other widths than its own."""
    import torch

    peer = torchvision()
    blocks, nn = peer.models.resnet, torch.nn

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            before = cfg["embedding_size"]
            self.conv1 = nn.Conv2d(cfg.get("num_channels", 3), before, 7, 2, 3, bias=False)
            self.bn1 = norm(before)
            for number, (depth, width) in enumerate(zip(cfg["depths"], cfg["hidden_sizes"], strict=True), 1):
                layers = []
                for index in range(depth):
                    stride = 2 if number > 1 and index == 0 else 1
                    down = None
                    if stride > 1 or before != width:
                        down = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width))
                    basic = cfg["layer_type"] == "basic"
                    make, planes = (blocks.BasicBlock, width) if basic else (blocks.Bottleneck, width // 4)
                    layers.append(make(before, planes, stride, down, norm_layer=norm))
                    before = width
                setattr(self, f"layer{number}", nn.Sequential(*layers))

        def forward(self, x: Any) -> dict[str, Any]:
            x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            found = {}
            for number in range(len(cfg["depths"])):
                x = found[str(number)] = getattr(self, f"layer{number + 1}")(x)
            return found

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            extra = peer.ops.feature_pyramid_network.LastLevelMaxPool()
            self.body, self.out_channels = Body(), cfg["out_channels"]
            self.fpn = peer.ops.FeaturePyramidNetwork(cfg["hidden_sizes"], self.out_channels, extra)

        def forward(self, x: Any) -> dict[str, Any]:
            return self.fpn(self.body(x))

    return Backbone()


def shapes(peer: Any) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the peer's tensors, without torch's counters of batches."""
    return {name: tuple(x.shape) for name, x in peer.state_dict().items() if not name.endswith("num_batches_tracked")}


def fill(peer: Any, tensors: dict[str, np.ndarray]) -> Any:
    """Copy tensors into the peer."""
    import torch

    held = peer.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(torch.from_numpy(tensor.copy()))
    return peer


def theirs(
    peer: Any, rows: dict[str, np.ndarray], quotas: tuple[int, int]
) -> tuple[dict[str, Any], tuple[Drawn, Drawn]]:
    """Return the peer's answer to images, in our layout, and the samples that it drew for the losses."""
    import torch

    torch.manual_seed(0)
    images = torch.from_numpy(rows["images"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        listed = torchvision().models.detection.image_list.ImageList(images, [tuple(images.shape[2:])] * len(images))
        maps = peer.backbone(images)
        objectness, deltas = peer.rpn.head(list(maps.values()))
        scores, boxes = torchvision().models.detection.rpn.concat_box_prediction_layers(objectness, deltas)
        proposals, _ = peer.rpn(listed, maps)
        crops = peer.roi_heads.box_roi_pool(maps, proposals, listed.image_sizes)
        logits, refined = peer.roi_heads.box_predictor(peer.roi_heads.box_head(crops))
        detections = peer(list(images))
    counts = [len(found) for found in proposals]
    answer = {
        "maps": [x.permute(0, 2, 3, 1).numpy() for x in maps.values()],
        "anchors": peer.rpn.anchor_generator(listed, list(maps.values()))[0].numpy(),
        "objectness": scores.reshape(len(images), -1).numpy(),
        "deltas": boxes.reshape(len(images), -1, 4).numpy(),
        "proposals": [found.numpy() for found in proposals],
        "logits": [found.numpy() for found in logits.split(counts)],
        "refined": [found.numpy().reshape(len(found), -1, 4) for found in refined.split(counts)],
        "detections": [{key: x.numpy() for key, x in found.items()} for found in detections],
    }
    losses, samples = _training(peer, images, rows, quotas)
    return answer | losses, samples


def _training(peer: Any, images: Any, rows: dict[str, np.ndarray], quotas: tuple[int, int]) -> Any:
    """Return losses, gradients and training proposals, and the samples, in our numbering of candidates."""
    import torch

    drawn: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for sampler, quota in zip((peer.rpn.fg_bg_sampler, peer.roi_heads.fg_bg_sampler), quotas, strict=True):
        sampler.batch_size_per_image = quota

    def recorded(sampler: Any) -> Any:
        def sample(labels: Any) -> Any:
            found = sampler(labels)
            drawn.append([(x.bool().numpy(), y.bool().numpy()) for x, y in zip(*found, strict=True)])
            return found

        return sample

    proposals: list[Any] = []
    hook = peer.rpn.register_forward_hook(lambda _, __, out: proposals.extend(x.numpy() for x in out[0]))
    kept = peer.rpn.fg_bg_sampler, peer.roi_heads.fg_bg_sampler
    peer.rpn.fg_bg_sampler, peer.roi_heads.fg_bg_sampler = map(recorded, kept)
    targets = [
        {"boxes": torch.from_numpy(boxes[mask].copy()), "labels": torch.from_numpy(labels[mask] + 1).long()}
        for boxes, labels, mask in zip(rows["boxes"], rows["labels"], rows["box_mask"], strict=True)
    ]
    peer.zero_grad()
    peer.rpn.training = peer.roi_heads.training = peer.training = True  # the batch norms stay in evaluation
    losses = peer(list(images), targets)
    sum(losses.values()).backward()
    peer.eval()
    hook.remove()
    peer.rpn.fg_bg_sampler, peer.roi_heads.fg_bg_sampler = kept
    first, second = (_samples(found, quota) for found, quota in zip(drawn, quotas, strict=True))
    limit = peer.rpn._post_nms_top_n["training"]
    counts = np.array([len(found) for found in proposals])[:, None]
    index = np.where(second.index < counts, second.index, second.index - counts + limit)  # objects follow all places
    gradients = {name: np.zeros(shape, np.float32) for name, shape in shapes(peer).items()}
    gradients |= {name: x.grad.numpy().copy() for name, x in peer.named_parameters()}
    found = {
        "train_proposals": proposals,
        "losses": {ours: losses[theirs].item() for ours, theirs in LOSSES.items()},
        "gradients": gradients,
    }
    return found, (first, Drawn(index, second.positive))


def _samples(masks: list[tuple[np.ndarray, np.ndarray]], quota: int) -> Drawn:
    """Return the numbers of the samples, positive ones first; every image must fill its quota."""
    index, positive = [], []
    for is_positive, is_negative in masks:
        chosen = [np.flatnonzero(mask) for mask in (is_positive, is_negative)]
        assert sum(map(len, chosen)) == quota, f"{len(chosen[0])} + {len(chosen[1])} samples, not {quota}"
        index.append(np.concatenate(chosen))
        positive.append(np.arange(quota) < len(chosen[0]))
    return Drawn(np.stack(index), np.stack(positive))
