"""Layers and tensor names of YOLOv3 (Redmon & Farhadi 2018) in Darknet's files.

A .cfg lists the layers of any network. The config is guessed from a few of them, and then every layer of that config is
compared with the file's: whatever is not YOLOv3, YOLOv3-tiny or YOLOv3-spp of some widths is refused, layer by name.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError, shown
from fm_jax.hub.example import Example, Size, image
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import darknet
from fm_jax.hub.files.darknet import Layer, Section
from fm_jax.hub.language import heads
from fm_jax.hub.table import Entry, Table, same
from fm_jax.hub.vision import parts
from fm_jax.models.vision.yolov3 import Config, YOLOv3, neck_layers

KINDS = {"yolov3": "YOLOv3"}

_WORDS = {"bias": "biases", "scale": "scales", "mean": "rolling_mean", "var": "rolling_variance"}  # as in the file
_TRAINING = {"jitter": ".3", "ignore_thresh": ".7", "truth_thresh": "1", "random": "1"}  # of the published files


def module(fields: Fields) -> nn.Module:
    """Build the module of a Darknet .cfg, whose sections are given as [[kind, {option: value}], …]."""
    where = fields.where
    net, layers = darknet.layers(_given(fields), where)
    darknet.convolutions(net, layers, where)
    cfg = _config(net, layers, where)
    parts.check_image(fields, *cfg.image_size, cfg.in_channels)
    _, wanted = darknet.layers([section for section, _ in sections(cfg)], where)
    for number, theirs in enumerate(layers):  # never fewer than wanted: those end with as many [yolo]
        if number >= len(wanted):
            raise CheckpointError(f"{where}: {darknet.name(number, theirs.kind)} comes after YOLOv3's last [yolo]")
        _compare(theirs, wanted[number], number, where)
    return YOLOv3(cfg)


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the fields from which `module` builds an equal module."""
    return {
        "architectures": ["YOLOv3"],
        "model_type": "yolov3",
        **heads.labels(module.cfg.num_classes),
        "sections": [[kind, dict(options)] for (kind, options), _ in sections(module.cfg)],
    }


def sections(cfg: Config) -> list[tuple[Section, str]]:
    """Return the sections of a model's .cfg, and for each [convolutional] the path of its parameters, for others ""."""
    height, width = cfg.image_size
    start = {"batch": "64", "subdivisions": "16", "width": width, "height": height, "channels": cfg.in_channels}
    made = [(Section("net", {name: str(value) for name, value in start.items()}), "")]

    def add(kind: str, path: str = "", **options: Any) -> int:
        made.append((Section(kind, {name: str(value) for name, value in options.items()}), path))
        return len(made) - 2  # its number

    back: dict[str, Any] = {"from": -3, "activation": "linear"}

    def layer(path: str, filters: int, size: int, stride: int = 1) -> int:
        how: dict[str, Any] = {"filters": filters, "size": size, "stride": stride, "pad": 1, "activation": "leaky"}
        return add("convolutional", path, batch_normalize=1, **how)

    end = layer("stem", cfg.widths[0], 3)
    ends = [end]
    for stage, wide in enumerate(cfg.widths[1:], 1):
        if cfg.depths:
            end = layer(f"stage{stage}/down", wide, 3, 2)
            for block in range(cfg.depths[stage - 1]):
                layer(f"stage{stage}/block{block}/conv1", wide // 2, 1)
                layer(f"stage{stage}/block{block}/conv2", wide, 3)
                end = add("shortcut", **back)
        else:
            add("maxpool", size=2, stride=2 if stage <= cfg.halvings else 1)
            end = layer(f"stage{stage}/conv", wide, 3)
        ends.append(end)
    for scale, wide in enumerate(cfg.head_widths, 1):
        if scale > 1:
            add("route", layers=end - len(made) + 1)
            layer(f"lateral{scale}", wide // 2, 1)
            add("upsample", stride=2)
            end = add("route", layers=f"-1,{ends[cfg.halvings + 1 - scale]}")
        for number, (size, out, pooled) in enumerate(neck_layers(cfg, scale), 1):
            if pooled:
                for place, side in enumerate(cfg.pools):
                    if place:
                        add("route", layers=-2 * place)
                    add("maxpool", stride=1, size=side)
                add(
                    "route",
                    layers=",".join(str(-1 - 2 * place) for place in range(len(cfg.pools))) + f",{-2 * place - 2}",
                )
            end = layer(f"neck{scale}/conv{number}", out, size)
        layer(f"head{scale}", wide, 3)
        filters = len(cfg.anchors[scale - 1]) * (5 + cfg.num_classes)
        add("convolutional", f"predict{scale}", filters=filters, size=1, stride=1, pad=1, activation="linear")
        add("yolo", **_anchors(cfg, scale), **_TRAINING)
    return made


def _anchors(cfg: Config, scale: int) -> dict[str, Any]:
    """Return the options of a [yolo]: the anchors of all scales, the finest first, and the numbers of its own."""
    counts = [len(pairs) for pairs in cfg.anchors]
    first = sum(counts[scale:])
    sides = [side for pairs in reversed(cfg.anchors) for pair in pairs for side in pair]
    return {
        "mask": ",".join(str(first + number) for number in range(counts[scale - 1])),
        "anchors": ",".join(str(int(side)) if side == int(side) else repr(side) for side in sides),
        "classes": cfg.num_classes,
        "num": sum(counts),
    }


def _given(fields: Fields) -> list[Section]:
    """Return the sections that are given as JSON data; options that would not be read are refused."""
    listed = []
    for number, entry in enumerate(fields.take("sections", list), -1):
        kind, options = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(kind, str) or not isinstance(options, dict) or number >= darknet.MAX_SECTIONS:
            raise CheckpointError(f"{fields.where}: sections {shown(entry)} is not [kind, {{option: value}}]")
        if not all(isinstance(value, str) for value in options.values()):
            raise CheckpointError(f"{fields.where}: {darknet.name(number, kind)} has a value that is not a text")
        if kind in darknet.KINDS and (unknown := sorted(options.keys() - darknet.known(kind))):
            fields.refuse(f"{darknet.name(number, kind)} has the unknown option {shown(unknown[0])}")
        listed.append(Section(kind, options))
    return listed


def _config(net: Layer, layers: Sequence[Layer], where: str) -> Config:
    """Return the config that the layers may be those of."""
    ends = [number for number, layer in enumerate(layers) if layer.kind == "yolo"]
    if not ends or ends[0] < 3 or layers[0].kind != "convolutional":
        raise CheckpointError(
            f"{where}: its layers do not begin with [convolutional] and lead to [yolo], as YOLOv3's do"
        )
    first = layers[: ends[0]]
    widths, depths, pools = [layers[0].options["filters"]], list[int](), list[int]()
    if any(layer.kind == "shortcut" for layer in first):
        for number, (kind, options) in enumerate(first):
            called = f"{where}: {darknet.name(number, kind)}"
            if kind == "convolutional" and options["stride"] > 1:
                if depths and not depths[-1]:
                    raise CheckpointError(f"{called} halves the image, and no [shortcut] is in the stage before it")
                widths.append(options["filters"])
                depths.append(0)
            elif kind == "shortcut":
                if not depths:
                    raise CheckpointError(f"{called} comes before a layer of stride 2")
                depths[-1] += 1
            elif kind == "maxpool":
                pools.append(options["size"])
    else:
        if first[1].kind != "maxpool":
            raise CheckpointError(f"{where}: {darknet.name(1, first[1].kind)} is neither YOLOv3's nor YOLOv3-tiny's")
        for pool, layer in zip(first[1::2], first[2::2], strict=False):
            if (pool.kind, layer.kind) != ("maxpool", "convolutional"):
                break
            widths.append(layer.options["filters"])
    heads = [layers[end - 2].options.get("filters", 0) for end in ends]
    anchors = tuple(tuple(_pairs(layers[end].options)) for end in ends)
    size = (net.options["height"], net.options["width"])
    classes, channels = layers[ends[0]].options["classes"], net.options["channels"]
    return Config(tuple(widths), tuple(depths), tuple(heads), anchors, classes, tuple(pools), size, channels)


def _pairs(options: Any) -> list[tuple[float, float]]:
    """Return the (width, height) of a [yolo]'s own anchors."""
    sides = options["anchors"]
    return [(sides[2 * number], sides[2 * number + 1]) for number in options["mask"]]


def _compare(theirs: Layer, ours: Layer, number: int, where: str) -> None:
    """Raise if a layer of the file is not that of the config."""
    called = f"{where}: {darknet.name(number, theirs.kind)}"
    if theirs.kind != ours.kind:
        raise CheckpointError(f"{called} is not YOLOv3's, which has [{ours.kind}] there")
    found, wanted = (
        {**layer.options, "anchors": _pairs(layer.options), "mask": (), "num": 0}
        if layer.kind == "yolo"
        else layer.options
        for layer in (theirs, ours)
    )
    for option, want in wanted.items():
        if found[option] != want:
            raise CheckpointError(
                f"{called} has {option} {shown(found[option])}; YOLOv3 of these widths has {shown(want)}"
            )


def table(module: nn.Module) -> Table:
    """Return the table of a YOLOv3's tensor names, in the order of the file."""
    entries: list[Entry] = []
    for number, (_, path) in enumerate(sections(module.cfg), -1):
        if path.startswith("predict"):
            entries.append(same(f"{path}/bias", f"{number}.biases"))
        elif path:
            entries += (same(f"{path}/norm/{ours}", f"{number}.{theirs}") for ours, theirs in _WORDS.items())
        if path:
            kernel = f"{path}/kernel" if path.startswith("predict") else f"{path}/conv/kernel"
            entries.append(Entry(kernel, f"{number}.weights", axes=(2, 3, 1, 0)))
    return Table(tuple(entries))


def writes(module: nn.Module) -> bool:
    """Say whether a module is a YOLOv3."""
    return isinstance(module, YOLOv3)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random images of the smallest size that has cells at every scale."""
    side = max(module.cfg.strides)
    return Example({"image": image(rng, size, side, side, module.cfg.in_channels)})


def sites(module: nn.Module) -> dict[str, str]:
    """Return {}: transformers has no YOLOv3 to compare with."""
    return {}
