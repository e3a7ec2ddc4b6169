"""Config and names of Faster R-CNN (Ren et al. 2015) on a ResNet pyramid, in torchvision.

torchvision writes no config.json; this is ours, in the words of its constructors. Without further fields it is
`fasterrcnn_resnet50_fpn`, so a folder of public weights needs {"model_type": "faster_rcnn"}, and `"norm_eps": 0.0` for
the weights COCO_V1, whose batch norms were trained so. The tensors are what `state_dict()` gives.
"""

from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Spec
from fm_jax.hub.language import heads
from fm_jax.hub.table import Blank, Entry, Table, linear, same
from fm_jax.hub.vision import parts
from fm_jax.hub.vision.parts import batch_norm, convolution
from fm_jax.hub.vision.resnet import BLOCKS
from fm_jax.models.vision import resnet
from fm_jax.models.vision.faster_rcnn import Config, FasterRCNN

KINDS = {"faster_rcnn": "FasterRCNN"}
_DEPTHS, _WIDTHS = [3, 4, 6, 3], [256, 512, 1024, 2048]
_SIZES, _RATIOS = [32.0, 64.0, 128.0, 256.0, 512.0], [0.5, 1.0, 2.0]
_SIDE = 128  # of an example
_MOST = 1 << 16  # boxes of one kind
_OLDER = (  # names before torchvision 0.13, which its public files have
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)", r"backbone.fpn.\1_blocks.\2.0.\3"),
)


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of model_type "faster_rcnn" describes."""
    if fields.architecture not in ("", "FasterRCNN"):
        fields.refuse(f"architectures is {fields.architecture}; supported is FasterRCNN")
    depths, channels = parts.sizes(fields, "depths", _DEPTHS), fields.take("num_channels", int, 3)
    parts.check_blocks(fields, "depths", sum(depths))
    parts.check_image(fields, _SIDE, _SIDE, channels)
    base = resnet.Config(
        depths,
        parts.sizes(fields, "hidden_sizes", _WIDTHS),
        fields.choose("layer_type", BLOCKS, "bottleneck"),
        stem_width=fields.take("embedding_size", int, 64),
        in_channels=channels,
        norm_epsilon=fields.take("norm_eps", float, 1e-5),
        norm_frozen=fields.take("norm_frozen", bool, True),
    )
    named = heads.num_classes(fields) if fields.has("id2label") else None
    count = fields.take("num_classes", int, 91 if named is None else named + 1, most=_MOST)
    if named is not None and named + 1 != count:
        fields.refuse(f"num_classes is {count}, with the background, but id2label names {named}")

    def both(name: str, train: int, test: int) -> tuple[int, int]:
        first = fields.take(f"{name}_train", int, train, most=_MOST)
        return first, fields.take(f"{name}_test", int, test, most=_MOST)

    cfg = Config(
        count - 1,
        width=fields.take("out_channels", int, 256),
        anchor_sizes=tuple(fields.many("anchor_sizes", float, _SIZES)),
        anchor_ratios=tuple(fields.many("aspect_ratios", float, _RATIOS)),
        decoded=both("rpn_pre_nms_top_n", 2000, 1000),
        proposals=both("rpn_post_nms_top_n", 2000, 1000),
        proposal_overlap=fields.take("rpn_nms_thresh", float, 0.7),
        crop=fields.take("output_size", int, 7, most=_SIDE),
        sampling=fields.take("sampling_ratio", int, 2, most=_SIDE),
        canonical=fields.take("canonical_scale", float, 224.0),
        head_width=fields.take("representation_size", int, 1024),
        score=fields.take("box_score_thresh", float, 0.05),
        overlap=fields.take("box_nms_thresh", float, 0.5),
        detections=fields.take("box_detections_per_img", int, 100, most=_MOST),
    )
    return FasterRCNN(cfg, resnet.ResNet(base))


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg, base = module.cfg, backbone(module).cfg
    counted = {
        f"{name}_{when}": number
        for name, pair in (("rpn_pre_nms_top_n", cfg.decoded), ("rpn_post_nms_top_n", cfg.proposals))
        for when, number in zip(("train", "test"), pair, strict=True)
    }
    return {
        "architectures": ["FasterRCNN"],
        "model_type": "faster_rcnn",
        "num_classes": cfg.num_classes + 1,
        **heads.labels(cfg.num_classes),
        "depths": list(base.depths),
        "hidden_sizes": list(base.widths),
        "layer_type": base.block,
        "embedding_size": base.stem_width,
        "num_channels": base.in_channels,
        "norm_eps": base.norm_epsilon,
        "norm_frozen": base.norm_frozen,
        "out_channels": cfg.width,
        "anchor_sizes": list(cfg.anchor_sizes),
        "aspect_ratios": list(cfg.anchor_ratios),
        **counted,
        "rpn_nms_thresh": cfg.proposal_overlap,
        "output_size": cfg.crop,
        "sampling_ratio": cfg.sampling,
        "canonical_scale": cfg.canonical,
        "representation_size": cfg.head_width,
        "box_score_thresh": cfg.score,
        "box_nms_thresh": cfg.overlap,
        "box_detections_per_img": cfg.detections,
    }


def table(module: nn.Module) -> Table:
    """Return the table of the model's tensor names."""
    cfg = backbone(module).cfg
    entries = list(_layer("stem", "norm_stem", "conv1", "bn1"))
    for stage, depth in enumerate(cfg.depths, 1):
        for block in range(depth):
            ours, theirs = f"stage{stage}/block{block}", f"layer{stage}.{block}"
            for layer in range(1, 3 if cfg.block == "basic" else 4):
                entries += _layer(
                    f"{ours}/conv{layer}", f"{ours}/norm{layer}", f"{theirs}.conv{layer}", f"{theirs}.bn{layer}"
                )
            entries += _layer(
                f"{ours}/shortcut", f"{ours}/norm_shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1"
            )
    blanks = tuple(  # of batch norms that are not frozen; torchvision's frozen ones drop them
        Blank(entry.name, entry.name.replace("running_var", "num_batches_tracked"), Spec("int64", ()))
        for entry in entries
        if entry.name.endswith(".running_var")
    )
    return Table(tuple(entries), _OLDER, (parts.COUNTERS,), blank=blanks).under("backbone", *_heads(len(cfg.depths)))


def _layer(conv: str, norm: str, their_conv: str, their_norm: str) -> list[Entry]:
    body = "backbone.body"
    return [*convolution(conv, f"{body}.{their_conv}"), *batch_norm(norm, f"{body}.{their_norm}")]


def _heads(count: int) -> list[Entry]:
    """Return the entries of all but the backbone, for a pyramid of so many stages."""
    fpn, rpn, box = "backbone.fpn", "rpn.head", "roi_heads.box"
    entries: list[Entry] = []
    for number in range(count):
        entries += convolution(f"pyramid/lateral{number + 1}", f"{fpn}.inner_blocks.{number}.0", bias=True)
        entries += convolution(f"pyramid/out{number + 1}", f"{fpn}.layer_blocks.{number}.0", bias=True)
    for ours, theirs in {"hidden": "conv.0.0", "objectness": "cls_logits", "deltas": "bbox_pred"}.items():
        entries += convolution(f"rpn/{ours}", f"{rpn}.{theirs}", bias=True)
    # theirs reads a crop as one row: channels, rows, columns
    entries.append(Entry("box/hidden1/kernel", f"{box}_head.fc6.weight", axes=(2, 3, 1, 0), merged=True))
    entries.append(same("box/hidden1/bias", f"{box}_head.fc6.bias"))
    entries += linear("box/hidden2", f"{box}_head.fc7")
    entries += linear("box/logits", f"{box}_predictor.cls_score")
    entries += linear("box/deltas", f"{box}_predictor.bbox_pred")
    return entries


def writes(module: nn.Module) -> bool:
    """Say whether a module is a Faster R-CNN on a ResNet."""
    return isinstance(module, FasterRCNN) and isinstance(module.backbone, resnet.ResNet)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of the module."""
    return parts.example(module, rng, size, _SIDE)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare: transformers has no such model."""
    return {}
