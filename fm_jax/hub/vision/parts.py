"""Tensor names and config fields that image families share: convolution, batch norm, the classification head."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError, shown
from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size, image
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Spec
from fm_jax.hub.language import heads
from fm_jax.hub.table import Blank, Entry, Table, same
from fm_jax.models.vision.classifier import ImageClassifier

COUNTERS = r".*\.num_batches_tracked"  # of torch's batch normalisation; only used without a momentum
_LARGEST = 100_000
_STAGES = 32
_BLOCKS = 1_000  # of a convolutional network, whose blocks are traced one by one; ResNet-1202 has 600
_NUMBERS = 1 << 25  # of an image: 3,300 × 3,300 × 3


def convolution(path: str, name: str, *, bias: bool = False) -> tuple[Entry, ...]:
    """Return the entries of a convolution: kernel [k, k, in, out] here, [out, in, k, k] in torch; bias if it has one.

    A depthwise kernel is [k, k, 1, C] here and [C, 1, k, k] in torch.
    """
    kernel = Entry(f"{path}/kernel", f"{name}.weight", axes=(2, 3, 1, 0))
    return (kernel, same(f"{path}/bias", f"{name}.bias")) if bias else (kernel,)


def batch_norm(path: str, name: str) -> tuple[Entry, ...]:
    """Return the entries of a batch normalisation: scale, bias, running mean and variance."""
    words = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(same(f"{path}/{ours}", f"{name}.{theirs}") for ours, theirs in words.items())


def table(entries: Iterable[Entry], prefix: str, parts: str) -> Table:
    """Return the table of a backbone whose names begin with `prefix`; files of base models omit the prefix.

    Args:
        entries: entries of its leaves.
        prefix: first word of every name.
        parts: regular expression for the second word.
    """
    backbone_entries = tuple(entries)
    counted = [entry.name for entry in backbone_entries if entry.name.endswith(".running_var")]
    return Table(
        backbone_entries,
        rename=((rf"((?:{parts})\..*)", rf"{prefix}.\1"),),
        skip=(COUNTERS,),
        blank=tuple(
            Blank(name, name.replace("running_var", "num_batches_tracked"), Spec("int64", ())) for name in counted
        ),
    )


def headed(fields: Fields, backbone: nn.Module, kind: str, dropout: float = 0.0) -> nn.Module:
    """Return the backbone, or a classifier on it, as `architectures` says."""
    if fields.architecture == f"{kind}Model":
        return backbone
    if fields.architecture not in ("", f"{kind}ForImageClassification"):
        fields.refuse(f"architectures is {fields.architecture}; supported are {kind}(Model, ForImageClassification)")
    return ImageClassifier(backbone, heads.num_classes(fields), dropout)


def architecture(module: nn.Module, kind: str) -> dict[str, Any]:
    """Return the fields that name the class, and a classifier's labels.

    Raises:
        CheckpointError: the head has no bias, which transformers does not support.
    """
    if not isinstance(module, ImageClassifier):
        return {"architectures": [f"{kind}Model"]}
    if not module.bias:
        raise CheckpointError(
            f"transformers has no class for this model: {kind}ForImageClassification always has a bias"
        )
    return {"architectures": [f"{kind}ForImageClassification"], **heads.labels(module.num_classes)}


def sizes(fields: Fields, name: str, default: list[int]) -> tuple[int, ...]:
    """Return a field that lists one size a stage.

    Raises:
        CheckpointError: it is not a list of integers, or a size is out of range.
    """
    listed = fields.many(name, int, default, longest=_STAGES)
    if not listed or any(not 0 < size < _LARGEST for size in listed):
        raise CheckpointError(f"{fields.where}: {name} {shown(listed)} is not a list of sizes, one a stage")
    return tuple(listed)


def check_blocks(fields: Fields, name: str, count: float) -> None:
    """Refuse more blocks than a network has, before one is made.

    Raises:
        CheckpointError: the field `name` asks for more.
    """
    if count > _BLOCKS:
        raise CheckpointError(f"{fields.where}: {name} asks for {count:,.0f} blocks; at most {_BLOCKS:,} are supported")


def check_image(fields: Fields, height: int, width: int, channels: int) -> None:
    """Refuse an image so large that an example of it would fill the memory.

    Raises:
        CheckpointError: it has more numbers than any model reads.
    """
    if height * width * channels > _NUMBERS:
        raise CheckpointError(
            f"{fields.where}: images of {height} × {width} × {channels} are too large; at most {_NUMBERS:,} numbers "
            "are supported"
        )


def is_on(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module is a backbone of class `kind`, or a classifier on one."""
    return isinstance(module.backbone if isinstance(module, ImageClassifier) else module, kind)


def example(module: nn.Module, rng: np.random.Generator, size: Size, side: int) -> Example:
    """Draw random square images [B, side, side, C] for a backbone or a classifier on one."""
    return Example({"image": image(rng, size, side, side, backbone(module).cfg.in_channels)})


def stages(module: nn.Module, blocks: Iterable[int]) -> dict[str, str]:
    """Return {their output: our site} to compare.

    Args:
        module: a backbone, or a classifier on one; only a backbone returns its final feature map.
        blocks: the last layer of each stage, by their numbers.
    """
    names = {"embed": "embed"} | {f"layer {end}": f"conv.stage{stage}" for stage, end in enumerate(blocks, 1)}
    return names if isinstance(module, ImageClassifier) else names | {"final": "final"}
