"""What the decoder families share: language model or classifier, and the fields that say so."""

from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.example import Example, Size, text
from fm_jax.hub.fields import Fields
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder


def headed(fields: Fields, decoder: Decoder, kind: str) -> nn.Module:
    """Return the decoder as a language model, or the classifier on it that `architectures` names."""
    architecture = fields.architecture
    if architecture == f"{kind}ForSequenceClassification":
        if not fields.has("pad_token_id"):
            fields.refuse("pad_token_id is missing: without it no row's last token is known")
        return Classifier(decoder, num_classes(fields), pool="last", bias=False)
    if architecture not in ("", f"{kind}LMHeadModel", f"{kind}Model", f"{kind}ForCausalLM"):
        fields.refuse(f"architectures names {architecture}: supported are the language model and the classifier")
    elif architecture == f"{kind}Model" and not decoder.cfg.tied:
        fields.refuse(f"architectures names {architecture}, which has no head, and the config ties none")
    return decoder


def backbone(module: nn.Module) -> Decoder:
    """Return the decoder of a language model or of a classifier on one."""
    found = module.backbone if isinstance(module, Classifier) else module
    if not isinstance(found, Decoder):
        raise CheckpointError(f"a {type(found).__name__} is no decoder, and has no name in this family")
    return found


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw what a decoder, or a classifier on one, is called with."""
    tokens, length, inside = text(backbone(module).cfg, rng, size)
    more = {"length": length} if isinstance(module, Classifier) else {}
    return Example({"tokens": tokens, **more}, inside)


def sites(module: nn.Module) -> dict[str, str]:
    """Return our name of each activation that is compared, by theirs; "layer" is every layer's output."""
    backbone(module)
    return {"embed": "embed", "layer": "block.resid_post", "final": "final"}


def num_classes(fields: Fields) -> int:
    """Return how many labels a classifier's config has: the entries of id2label, two where it names none."""
    if fields.has("id2label"):
        return len(fields.take("id2label", dict))
    return fields.take("num_labels", int, 2)


def labels(count: int) -> dict[str, Any]:
    """Return the label fields of a classifier's config."""
    names = [f"LABEL_{index}" for index in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def split(fields: Fields, width: int, heads: int) -> int:
    """Return the width of a head.

    Raises:
        CheckpointError: the heads do not divide the width.
    """
    if heads < 1 or width % heads:
        raise CheckpointError(f"{fields.where}: a width of {width} does not divide into {heads} heads")
    return width // heads
