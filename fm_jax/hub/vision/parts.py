"""What the convolutional families share: names of their layers, and the classifier on a backbone."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size, image
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Spec
from fm_jax.hub.language import heads
from fm_jax.hub.table import Blank, Entry, Table, same
from fm_jax.models.vision.classifier import ImageClassifier

COUNTERS = r".*\.num_batches_tracked"  # of torch's batch normalisation; read only where it has no momentum
_LARGEST = 100_000


def convolution(path: str, name: str, *, bias: bool = False) -> tuple[Entry, ...]:
    """Return kernel (and bias) of a convolution, [k, k, in, out] of ours and [out, in, k, k] of torch's.

    A depthwise one is [k, k, 1, C] and [C, 1, k, k].
    """
    kernel = Entry(f"{path}/kernel", f"{name}.weight", axes=(2, 3, 1, 0))
    return (kernel, same(f"{path}/bias", f"{name}.bias")) if bias else (kernel,)


def batch_norm(path: str, name: str) -> tuple[Entry, ...]:
    """Return scale, bias and running moments of a batch normalisation."""
    words = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(same(f"{path}/{ours}", f"{name}.{theirs}") for ours, theirs in words.items())


def table(entries: Iterable[Entry], prefix: str, parts: str) -> Table:
    """Return the table of a backbone whose names begin with `prefix`; base models have theirs without it.

    Args:
        entries: of its leaves.
        prefix: the first word of every name.
        parts: a regular expression for the second.
    """
    found = tuple(entries)
    counted = [entry.name for entry in found if entry.name.endswith(".running_var")]
    return Table(
        found,
        rename=((rf"((?:{parts})\..*)", rf"{prefix}.\1"),),
        skip=(COUNTERS,),
        blank=tuple(
            Blank(name, name.replace("running_var", "num_batches_tracked"), Spec("int64", ())) for name in counted
        ),
    )


def headed(fields: Fields, backbone: nn.Module, kind: str, dropout: float = 0.0) -> nn.Module:
    """Return the backbone as it is, or the classifier on it, as `architectures` says."""
    if fields.architecture == f"{kind}Model":
        return backbone
    if fields.architecture not in ("", f"{kind}ForImageClassification"):
        fields.refuse(f"architectures names {fields.architecture}: supported are {kind}(Model, ForImageClassification)")
    return ImageClassifier(backbone, heads.num_classes(fields), dropout)


def architecture(module: nn.Module, kind: str) -> dict[str, Any]:
    """Return the fields that name the class, and a classifier's labels.

    Raises:
        CheckpointError: a head without a bias, which the other library has not.
    """
    if not isinstance(module, ImageClassifier):
        return {"architectures": [f"{kind}Model"]}
    if not module.bias:
        raise CheckpointError(f"no transformers class computes this: {kind}ForImageClassification has a bias")
    return {"architectures": [f"{kind}ForImageClassification"], **heads.labels(module.num_classes)}


def sizes(fields: Fields, name: str, default: list[int]) -> tuple[int, ...]:
    """Return a list of sizes, one a stage.

    Raises:
        CheckpointError: another value, or a size that no model has.
    """
    found = fields.take(name, list, default)
    if not found or any(type(size) is not int or not 0 < size < _LARGEST for size in found):
        raise CheckpointError(f"{fields.where}: {name} {str(found)[:80]} is no list of sizes, one a stage")
    return tuple(found)


def is_on(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module is a backbone of a class, or a classifier on one."""
    return isinstance(module.backbone if isinstance(module, ImageClassifier) else module, kind)


def example(module: nn.Module, rng: np.random.Generator, size: Size, side: int) -> Example:
    """Draw square images that a backbone, or a classifier on one, is called with."""
    return Example({"image": image(rng, size, side, side, backbone(module).cfg.in_channels)})


def stages(module: nn.Module, blocks: Iterable[int]) -> dict[str, str]:
    """Return our name of each activation that is compared, by theirs.

    Args:
        module: a backbone, or a classifier on one; only without the head its last activation is an output.
        blocks: number of what ends each stage, in their count of layers.
    """
    found = {"embed": "embed"} | {f"layer {end}": f"conv.stage{stage}" for stage, end in enumerate(blocks, 1)}
    return found if isinstance(module, ImageClassifier) else found | {"final": "final"}
