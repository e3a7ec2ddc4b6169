"""Config and names of ResNet (He et al. 2016), v1.5 and v1, in transformers."""

from typing import Any, Literal

import flax.linen as nn
import numpy as np

from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size
from fm_jax.hub.fields import Fields
from fm_jax.hub.table import Entry, Table, linear
from fm_jax.hub.vision import parts
from fm_jax.hub.vision.parts import batch_norm, convolution
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.resnet import Config, ResNet

KINDS = {"resnet": "ResNet"}
BLOCKS: dict[str, Literal["basic", "bottleneck"]] = {"basic": "basic", "bottleneck": "bottleneck"}
_SIDE = 224  # image size of the published models; the config has no such field
_DEPTHS, _WIDTHS = [3, 4, 6, 3], [256, 512, 1024, 2048]


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of model_type "resnet" describes."""
    fields.expect("hidden_act", "relu")
    fields.expect("downsample_in_first_stage", False)
    fields.skip("out_features", "out_indices", "stage_names")  # feature maps that a detector reads
    depths, channels = parts.sizes(fields, "depths", _DEPTHS), fields.take("num_channels", int, 3)
    parts.check_blocks(fields, "depths", sum(depths))
    parts.check_image(fields, _SIDE, _SIDE, channels)
    cfg = Config(
        depths,
        parts.sizes(fields, "hidden_sizes", _WIDTHS),
        fields.choose("layer_type", BLOCKS, "bottleneck"),
        stem_width=fields.take("embedding_size", int, 64),
        stride_first=fields.take("downsample_in_bottleneck", bool, False),
        in_channels=channels,
    )
    return parts.headed(fields, ResNet(cfg), KINDS[fields.kind])


def table(module: nn.Module) -> Table:
    """Return the table of a ResNet's tensor names."""
    cfg = backbone(module).cfg
    entries: list[Entry] = _layer("stem", "norm_stem", "resnet.embedder.embedder")
    for stage, depth in enumerate(cfg.depths):
        for block in range(depth):
            ours, theirs = f"stage{stage + 1}/block{block}", f"resnet.encoder.stages.{stage}.layers.{block}"
            for layer in range(2 if cfg.block == "basic" else 3):
                entries += _layer(f"{ours}/conv{layer + 1}", f"{ours}/norm{layer + 1}", f"{theirs}.layer.{layer}")
            entries += _layer(f"{ours}/shortcut", f"{ours}/norm_shortcut", f"{theirs}.shortcut")
    names = parts.table(entries, "resnet", "embedder|encoder")
    if isinstance(module, ImageClassifier):
        return names.under("backbone", *linear("head", "classifier.1"))
    return names


def _layer(conv: str, norm: str, name: str) -> list[Entry]:
    return [*convolution(conv, f"{name}.convolution"), *batch_norm(norm, f"{name}.normalization")]


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg = backbone(module).cfg
    return {
        **parts.architecture(module, "ResNet"),
        "model_type": "resnet",
        "depths": list(cfg.depths),
        "hidden_sizes": list(cfg.widths),
        "layer_type": cfg.block,
        "embedding_size": cfg.stem_width,
        "num_channels": cfg.in_channels,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": cfg.stride_first,
    }


def writes(module: nn.Module) -> bool:
    """Say whether a module is a ResNet, or a classifier on one."""
    return parts.is_on(module, ResNet)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of the module."""
    return parts.example(module, rng, size, _SIDE)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare: the output of each stage is that of its last layer."""
    return parts.stages(module, range(len(backbone(module).cfg.depths)))
