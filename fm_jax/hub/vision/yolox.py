"""Config and tensor names of YOLOX (Ge et al. 2021): those of the authors' code, which others keep.

Their files hold only tensors, so a folder needs no config.json: names and shapes tell the whole form. One that is saved
here has a config.json of the house. Their stem reads blue, green, red, and ours red, green, blue: the table swaps the
channels of its kernel in both directions, so both give the same numbers for one photograph.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size, image
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Spec
from fm_jax.hub.language import heads
from fm_jax.hub.table import Blank, Entry, Table
from fm_jax.hub.vision import parts
from fm_jax.hub.vision.parts import batch_norm, convolution
from fm_jax.models.vision.yolox import STRIDES, YOLOX, Config

KINDS = {"yolox": "YOLOX"}
_PIXELS = 4  # of the stem's 2×2, each with all its channels
_TRUNK = "backbone.backbone"


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of model_type "yolox" describes."""
    if fields.architecture not in ("", "YOLOX"):
        fields.refuse(f"architectures is {fields.architecture}; supported is YOLOX")
    depth, channels = fields.take("depth", int), fields.take("num_channels", int, 3)
    parts.check_blocks(fields, "depth", 12 * max(depth, 0))
    parts.check_image(fields, STRIDES[-1], STRIDES[-1], channels)
    cfg = Config(
        heads.num_classes(fields),
        depth,
        fields.take("width", int),
        fields.take("depthwise", bool, False),
        in_channels=channels,
    )
    return YOLOX(cfg)


def describe(specs: Mapping[str, Spec]) -> dict[str, Any] | None:
    """Return the config.json that names and shapes tell; None if they are not YOLOX's."""
    stem, classes = (
        specs.get(f"{name}.weight", Spec("", ())).shape for name in (f"{_TRUNK}.stem.conv.conv", "head.cls_preds.0")
    )
    depth = sum(f"{_TRUNK}.dark2.1.m.{block}.conv1.conv.weight" in specs for block in range(len(specs)))
    if len(stem) != 4 or len(classes) != 4 or not depth:
        return None
    return {
        "model_type": "yolox",
        "depth": depth,
        "width": stem[0],
        "depthwise": f"{_TRUNK}.dark2.0.dconv.conv.weight" in specs,
        "num_channels": stem[1] // _PIXELS,
        "num_labels": classes[0],
    }


def table(module: nn.Module) -> Table:
    """Return the table of a YOLOX's tensor names."""
    cfg: Config = backbone(module).cfg
    entries = [*_stem(cfg)]
    for stage, blocks in enumerate((cfg.depth, 3 * cfg.depth, 3 * cfg.depth, cfg.depth), 1):
        ours, theirs, last = f"stage{stage}", f"{_TRUNK}.dark{stage + 1}", stage == 4
        entries += _wide(cfg, f"{ours}/down", f"{theirs}.0")
        if last:
            entries += [*_unit(f"{ours}/windows/narrow", f"{theirs}.1.conv1")]
            entries += [*_unit(f"{ours}/windows/mix", f"{theirs}.1.conv2")]
        entries += _csp(cfg, f"{ours}/csp", f"{theirs}.{2 if last else 1}", blocks)
    for ours, theirs in {"reduce2": "lateral_conv0", "reduce1": "reduce_conv1"}.items():
        entries += _unit(f"pyramid/{ours}", f"backbone.{theirs}")
    for ours, theirs in {"halve1": "bu_conv2", "halve2": "bu_conv1"}.items():
        entries += _wide(cfg, f"pyramid/{ours}", f"backbone.{theirs}")
    for ours, theirs in {"down2": "C3_p4", "down1": "C3_p3", "up1": "C3_n3", "up2": "C3_n4"}.items():
        entries += _csp(cfg, f"pyramid/{ours}", f"backbone.{theirs}", cfg.depth)
    for level in range(len(STRIDES)):
        entries += _head(cfg, f"head{level + 1}", level)
    counted = [entry.name for entry in entries if entry.name.endswith(".running_var")]
    blank = (Blank(name, name.replace("running_var", "num_batches_tracked"), Spec("int64", ())) for name in counted)
    return Table(tuple(entries), skip=(parts.COUNTERS,), blank=tuple(blank))


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg: Config = backbone(module).cfg
    return {
        "architectures": ["YOLOX"],
        "model_type": "yolox",
        "depth": cfg.depth,
        "width": cfg.width,
        "depthwise": cfg.depthwise,
        "num_channels": cfg.in_channels,
        **heads.labels(cfg.num_classes),
    }


def writes(module: nn.Module) -> bool:
    """Say whether a module is a YOLOX."""
    return isinstance(module, YOLOX)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random images of the smallest size that has a place on every map."""
    side = STRIDES[-1]
    return Example({"images": image(rng, size, side, side, backbone(module).cfg.in_channels)})


def sites(module: nn.Module) -> dict[str, str]:
    """Return nothing to compare: transformers has no YOLOX."""
    return {}


def _stem(cfg: Config) -> tuple[Entry, ...]:
    channels = cfg.in_channels
    kernel, *norm = _unit("stem", f"{_TRUNK}.stem.conv")
    order = tuple(pixel * channels + channel for pixel in range(_PIXELS) for channel in reversed(range(channels)))
    return (Entry(kernel.path, kernel.name, kernel.axes, order=order), *norm)


def _unit(ours: str, theirs: str) -> tuple[Entry, ...]:
    return (*convolution(f"{ours}/conv", f"{theirs}.conv"), *batch_norm(f"{ours}/norm", f"{theirs}.bn"))


def _wide(cfg: Config, ours: str, theirs: str) -> tuple[Entry, ...]:
    if not cfg.depthwise:
        return _unit(ours, theirs)
    return (*_unit(f"{ours}/depthwise", f"{theirs}.dconv"), *_unit(f"{ours}/pointwise", f"{theirs}.pconv"))


def _csp(cfg: Config, ours: str, theirs: str, blocks: int) -> list[Entry]:
    found = list[Entry]()
    for layer, name in enumerate(("changed", "kept", "mix"), 1):
        found += _unit(f"{ours}/{name}", f"{theirs}.conv{layer}")
    for block in range(blocks):
        found += _unit(f"{ours}/block{block}_narrow", f"{theirs}.m.{block}.conv1")
        found += _wide(cfg, f"{ours}/block{block}_wide", f"{theirs}.m.{block}.conv2")
    return found


def _head(cfg: Config, ours: str, level: int) -> list[Entry]:
    found = [*_unit(f"{ours}/stem", f"head.stems.{level}")]
    for branch, name in {"classes": "cls", "boxes": "reg"}.items():
        for layer in (0, 1):
            found += _wide(cfg, f"{ours}/{branch}{layer + 1}", f"head.{name}_convs.{level}.{layer}")
    for last, name in {"class": "cls", "box": "reg", "object": "obj"}.items():
        found += convolution(f"{ours}/{last}", f"head.{name}_preds.{level}", bias=True)
    return found
