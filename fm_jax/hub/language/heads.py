"""Config fields that families share: language-model or classification head, labels, head width."""

from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.example import Example, Size, text
from fm_jax.hub.fields import Fields
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder


def headed(fields: Fields, decoder: Decoder, kind: str) -> nn.Module:
    """Return the decoder as a language model, or a classifier on it, as `architectures` says."""
    architecture = fields.architecture
    if architecture == f"{kind}ForSequenceClassification":
        if not fields.has("pad_token_id"):
            fields.refuse("pad_token_id is missing: the classifier needs it to find the last token of each row")
        return Classifier(decoder, num_classes(fields), pool="last", bias=False)
    if architecture not in ("", f"{kind}LMHeadModel", f"{kind}Model", f"{kind}ForCausalLM"):
        fields.refuse(f"architectures is {architecture}; supported are the language model and the sequence classifier")
    elif architecture == f"{kind}Model" and not decoder.cfg.tied:
        fields.refuse(f"architectures is {architecture}, which has no head; it needs tie_word_embeddings true")
    return decoder


def backbone(module: nn.Module) -> Decoder:
    """Return the decoder of a language model or of a classifier on one."""
    decoder = module.backbone if isinstance(module, Classifier) else module
    if not isinstance(decoder, Decoder):
        raise CheckpointError(f"a {type(decoder).__name__} is not a decoder, so this family has no names for it")
    return decoder


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of a decoder or a classifier on one."""
    tokens, length, inside = text(backbone(module).cfg, rng, size)
    more = {"length": length} if isinstance(module, Classifier) else {}
    return Example({"tokens": tokens, **more}, inside)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare; "layer" stands for every layer's output."""
    backbone(module)
    return {"embed": "embed", "layer": "block.resid_post", "final": "final"}


def num_classes(fields: Fields) -> int:
    """Return the number of classes in a classifier's config: the entries of id2label, else num_labels, else 2."""
    if fields.has("id2label"):
        return len(fields.take("id2label", dict))
    return fields.take("num_labels", int, 2)


def labels(count: int) -> dict[str, Any]:
    """Return id2label and label2id of a classifier with placeholder names."""
    names = [f"LABEL_{index}" for index in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def split(fields: Fields, width: int, heads: int) -> int:
    """Return the width of an attention head.

    Raises:
        CheckpointError: the heads do not divide the width.
    """
    if heads < 1 or width % heads:
        raise CheckpointError(f"{fields.where}: the width {width} is not divisible by the number of heads, {heads}")
    return width // heads
