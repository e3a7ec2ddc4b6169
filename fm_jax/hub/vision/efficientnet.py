"""Config and names of EfficientNet (Tan & Le 2019) in transformers.

Their padding equals TensorFlow's at one image size only: `depthwise_padding` lists the blocks that halve a feature map
of odd height at that size. Ours pads by the actual size. Their `batch_norm_momentum` is TensorFlow's momentum, the
share of the old mean that is kept, as here; they pass it to torch, where it means the share that is replaced.
"""

from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError, shown
from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size
from fm_jax.hub.fields import Fields
from fm_jax.hub.table import Entry, Table, linear
from fm_jax.hub.vision import parts
from fm_jax.hub.vision.parts import batch_norm, convolution
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.efficientnet import BASELINE, Config, EfficientNet, Stage

KINDS = {"efficientnet": "EfficientNet"}
_WIDEST = 100  # times the baseline's channels; the largest published model has 4.3
_NAMES = {
    "num_block_repeats": "repeats",
    "kernel_sizes": "size",
    "strides": "stride",
    "expand_ratios": "expand",
    "out_channels": "width",
}


def module(fields: Fields) -> nn.Module:
    """Build the module that a config.json of model_type "efficientnet" describes."""
    columns = [
        parts.sizes(fields, name, [getattr(stage, field) for stage in BASELINE]) for name, field in _NAMES.items()
    ]
    if len({len(column) for column in columns}) > 1:
        raise CheckpointError(f"{fields.where}: {', '.join(_NAMES)} must have equal lengths, one value a stage")
    stages = tuple(Stage(*row) for row in zip(*columns, strict=True))
    size, channels = fields.take("image_size", int, 600), fields.take("num_channels", int, 3)
    width, depth = fields.take("width_coefficient", float, 2.0), fields.take("depth_coefficient", float, 3.1)
    if not 0 < width < _WIDEST:
        raise CheckpointError(f"{fields.where}: width_coefficient {shown(width)} must be above 0 and below {_WIDEST}")
    parts.check_blocks(fields, "depth_coefficient", depth * sum(stage.repeats for stage in stages))
    parts.check_image(fields, size, size, channels)
    cfg = Config(
        width,
        depth,
        size,
        stages,
        divisor=fields.take("depth_divisor", int, 8),
        squeeze=fields.take("squeeze_expansion_ratio", float, 0.25),
        drop_path=fields.take("drop_connect_rate", float, 0.2),
        in_channels=channels,
        norm_epsilon=fields.take("batch_norm_eps", float, 1e-3),
        norm_momentum=fields.take("batch_norm_momentum", float, 0.99),
    )
    fields.expect("in_channels", [32, *(stage.width for stage in stages[:-1])])
    fields.expect("hidden_dim", cfg.channels(cfg.head_width))
    fields.expect("hidden_act", "swish", "silu")
    fields.expect("pooling_type", "mean")
    fields.skip("num_hidden_layers")
    _check_padding(fields, cfg)
    return parts.headed(fields, EfficientNet(cfg), KINDS[fields.kind], fields.take("dropout_rate", float, 0.5))


def _check_padding(fields: Fields, cfg: Config) -> None:
    """Refuse a config whose padding is not "SAME" at its own image size."""
    firsts = [sum(map(cfg.repeats, cfg.stages[:index])) for index in range(len(cfg.stages))]
    halving = {first for first, stage in zip(firsts, cfg.stages, strict=True) if stage.stride == 2}
    listed = fields.many("depthwise_padding", int, [])
    if cfg.image_size % 2:
        fields.refuse(
            f"image_size is {cfg.image_size}; only even sizes are supported, where stems pad as in TensorFlow"
        )
    if any(stage.stride > 2 for stage in cfg.stages):
        fields.refuse(f"strides is {[stage.stride for stage in cfg.stages]}, but only 1 and 2 are supported")
    if (padded := sorted(block for block in listed if block in halving)) != list(cfg.odd_blocks()):
        fields.refuse(f"depthwise_padding has {padded}, but image_size {cfg.image_size} needs {cfg.odd_blocks()}")


def table(module: nn.Module) -> Table:
    """Return the table of an EfficientNet's tensor names."""
    cfg = backbone(module).cfg
    entries: list[Entry] = [
        *convolution("stem", "efficientnet.embeddings.convolution"),
        *batch_norm("norm_stem", "efficientnet.embeddings.batchnorm"),
    ]
    places = [(index, block) for index, stage in enumerate(cfg.stages, 1) for block in range(cfg.repeats(stage))]
    for number, (index, block) in enumerate(places):
        ours, theirs = f"stage{index}_block{block}", f"efficientnet.encoder.blocks.{number}"
        entries += [
            *convolution(f"{ours}/expand", f"{theirs}.expansion.expand_conv"),
            *batch_norm(f"{ours}/norm_expand", f"{theirs}.expansion.expand_bn"),
            *convolution(f"{ours}/filter", f"{theirs}.depthwise_conv.depthwise_conv"),
            *batch_norm(f"{ours}/norm_filter", f"{theirs}.depthwise_conv.depthwise_norm"),
            *convolution(f"{ours}/squeeze/reduce", f"{theirs}.squeeze_excite.reduce", bias=True),
            *convolution(f"{ours}/squeeze/expand", f"{theirs}.squeeze_excite.expand", bias=True),
            *convolution(f"{ours}/narrow", f"{theirs}.projection.project_conv"),
            *batch_norm(f"{ours}/norm_narrow", f"{theirs}.projection.project_bn"),
        ]
    entries += convolution("top", "efficientnet.encoder.top_conv")
    entries += batch_norm("norm_top", "efficientnet.encoder.top_bn")
    names = parts.table(entries, "efficientnet", "embeddings|encoder")
    if isinstance(module, ImageClassifier):
        return names.under("backbone", *linear("head", "classifier"))
    return names


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    cfg = backbone(module).cfg
    return {
        **parts.architecture(module, "EfficientNet"),
        "model_type": "efficientnet",
        **{name: [getattr(stage, field) for stage in cfg.stages] for name, field in _NAMES.items()},
        "in_channels": [32, *(stage.width for stage in cfg.stages[:-1])],
        "width_coefficient": cfg.width,
        "depth_coefficient": cfg.depth,
        "depth_divisor": cfg.divisor,
        "depthwise_padding": list(cfg.odd_blocks()),
        "squeeze_expansion_ratio": cfg.squeeze,
        "image_size": cfg.image_size,
        "hidden_dim": cfg.channels(cfg.head_width),
        "hidden_act": "swish",
        "pooling_type": "mean",
        "num_channels": cfg.in_channels,
        "batch_norm_eps": cfg.norm_epsilon,
        "batch_norm_momentum": cfg.norm_momentum,
        "drop_connect_rate": cfg.drop_path,
        "dropout_rate": module.dropout if isinstance(module, ImageClassifier) else 0.0,
    }


def writes(module: nn.Module) -> bool:
    """Say whether a module is an EfficientNet, or a classifier on one."""
    return parts.is_on(module, EfficientNet)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of the module."""
    return parts.example(module, rng, size, backbone(module).cfg.image_size)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare: the output of each stage is that of its last layer."""
    cfg = backbone(module).cfg
    ends = np.cumsum([cfg.repeats(stage) for stage in cfg.stages]) - 1  # transformers numbers blocks, not stages
    return parts.stages(module, ends.tolist())
