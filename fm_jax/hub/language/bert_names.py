"""Tensor names of BERT, RoBERTa, DistilBERT, ELECTRA and ALBERT in transformers, with their heads."""

from dataclasses import dataclass, replace

import flax.linen as nn

from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import backbone
from fm_jax.hub.table import Entry, Table, linear, norm, same
from fm_jax.layers.readout import Hidden
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.span import SpanFinder
from fm_jax.models.language.tagger import Tagger

_DETECT = "discriminator_predictions"
_AS_BERT = (
    (r"electra\.(.*)", r"bert.\1"),
    (r"generator_predictions\.(.*)", r"cls.predictions.transform.\1"),
    (r"generator_lm_head\.bias", "cls.predictions.bias"),
    (r"generator_lm_head\.weight", "cls.predictions.decoder.weight"),
)
_UNREAD = (r"cls\.seq_relationship\..*", r"sop_classifier\..*")  # in files of masked language models, and never read


@dataclass(frozen=True)
class Kind:
    """Names and heads of one family."""

    stem: str  # stem of its class names
    body: tuple[Entry, ...]
    words: tuple[str, str, str]  # masked-language-model head: dense, norm, bias
    labels: tuple[str, str]  # classifier: hidden layer, last layer
    hidden: Hidden  # activation of the classifier's hidden layer
    pair: tuple[str, str] | None = None  # next-sentence head: pooler, last layer


def _embeddings(prefix: str) -> tuple[Entry, ...]:
    names = {"embed/tokens": "word", "embed/positions": "position", "types": "token_type"}
    tables = (same(path, f"{prefix}.embeddings.{name}_embeddings.weight") for path, name in names.items())
    return *tables, *norm("norm_embed", f"{prefix}.embeddings.LayerNorm")


def _bert(prefix: str) -> tuple[Entry, ...]:
    layer = f"{prefix}.encoder.layer.{{}}"
    return (
        *_embeddings(prefix),
        *linear("project", f"{prefix}.embeddings_project"),
        *(e for h in ("query", "key", "value") for e in linear(f"blocks/attn/{h[0]}", f"{layer}.attention.self.{h}")),
        *linear("blocks/attn/o", f"{layer}.attention.output.dense"),
        *norm("blocks/norm_attn", f"{layer}.attention.output.LayerNorm"),
        *linear("blocks/mlp/up", f"{layer}.intermediate.dense"),
        *linear("blocks/mlp/down", f"{layer}.output.dense"),
        *norm("blocks/norm_mlp", f"{layer}.output.LayerNorm"),
    )


_LAYER = "distilbert.transformer.layer.{}"
_DISTILBERT = (
    *_embeddings("distilbert"),
    *(e for h in "qkv" for e in linear(f"blocks/attn/{h}", f"{_LAYER}.attention.{h}_lin")),
    *linear("blocks/attn/o", f"{_LAYER}.attention.out_lin"),
    *norm("blocks/norm_attn", f"{_LAYER}.sa_layer_norm"),
    *linear("blocks/mlp/up", f"{_LAYER}.ffn.lin1"),
    *linear("blocks/mlp/down", f"{_LAYER}.ffn.lin2"),
    *norm("blocks/norm_mlp", f"{_LAYER}.output_layer_norm"),
)
_ALBERT = (*_embeddings("albert"), *linear("project", "albert.encoder.embedding_hidden_mapping_in"))


def _albert(groups: int = 1, inner: int = 1) -> tuple[Entry, ...]:
    """Return ALBERT's names, where the layers of each group share parameters."""
    entries = list(_ALBERT)
    for copy in range(groups * inner):
        ours = "block" if groups * inner == 1 else f"block/{copy}"
        theirs = f"albert.encoder.albert_layer_groups.{copy // inner}.albert_layers.{copy % inner}"
        entries += [
            *(e for h in ("query", "key", "value") for e in linear(f"{ours}/attn/{h[0]}", f"{theirs}.attention.{h}")),
            *linear(f"{ours}/attn/o", f"{theirs}.attention.dense"),
            *norm(f"{ours}/norm_attn", f"{theirs}.attention.LayerNorm"),
            *linear(f"{ours}/mlp/up", f"{theirs}.ffn"),
            *linear(f"{ours}/mlp/down", f"{theirs}.ffn_output"),
            *norm(f"{ours}/norm_mlp", f"{theirs}.full_layer_layer_norm"),
        ]
    return tuple(entries)


_TRANSFORM = "cls.predictions.transform"
_PROJECTED = ("classifier.dense", "classifier.out_proj")
BERT = Kind(
    "Bert",
    _bert("bert"),
    (f"{_TRANSFORM}.dense", f"{_TRANSFORM}.LayerNorm", "cls.predictions.bias"),
    ("bert.pooler.dense", "classifier"),
    "tanh",
    ("bert.pooler.dense", "cls.seq_relationship"),
)
ROBERTA = Kind("Roberta", _bert("roberta"), ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"), _PROJECTED, "tanh")
DISTILBERT = Kind(
    "DistilBert",
    _DISTILBERT,
    ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    ("pre_classifier", "classifier"),
    "relu",
)
ELECTRA = Kind(
    "Electra",
    _bert("electra"),
    ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    _PROJECTED,
    "gelu",
)
ALBERT = Kind(
    "Albert",
    _albert(),
    ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    ("albert.pooler", "classifier"),
    "tanh",
    ("albert.pooler", "sop_classifier.classifier"),
)
OF_TYPE = {  # model_type: its names and heads
    "bert": BERT, "roberta": ROBERTA, "xlm-roberta": ROBERTA, "distilbert": DISTILBERT, "electra": ELECTRA,
    "albert": ALBERT,
}  # fmt: skip


def kind_of(module: nn.Module) -> Kind:
    """Return the family of a module; ELECTRA without a narrower embedding and its own heads is BERT."""
    bare = backbone(module)
    if not isinstance(bare, Encoder):
        raise CheckpointError(f"a {type(bare).__name__} is not an encoder, so this family has no names for it")
    cfg = bare.cfg
    if cfg.shared:
        return ALBERT
    if not cfg.num_types:
        return DISTILBERT
    if cfg.position_offset:
        return ROBERTA
    return ELECTRA if cfg.embed_size or getattr(module, "hidden", "none") == "gelu" else BERT


def table(module: nn.Module) -> Table:
    """Return the table of a module's tensor names."""
    kind = kind_of(module)
    prefix, shared = kind.body[0].name.split(".")[0], backbone(module).cfg.shared
    names = Table(
        _albert(*shared) if isinstance(shared, tuple) else kind.body,
        rename=(
            (r"(.*LayerNorm)\.gamma", r"\1.weight"),  # in the first published files
            (r"(.*LayerNorm)\.beta", r"\1.bias"),
            # base models have no prefix; an ELECTRA of BERT's form is read under BERT's names
            (r"((?:embeddings|encoder|embeddings_project|transformer|pooler)\..*)", rf"{prefix}.\1"),
            *(_AS_BERT if kind is BERT else ()),
        ),
        skip=(r"(?:.*\.)?position_ids",),
    )
    no_pooler = (*names.skip, rf"(?:{prefix}\.)?pooler\..*")  # files of all tasks may hold one
    if isinstance(module, Encoder):
        return replace(names, skip=no_pooler)
    if isinstance(module, MaskedLM):
        dense, normed, bias = kind.words
        entries: tuple[Entry, ...] = (*linear("head/dense", dense), *norm("head/norm", normed), same("head/bias", bias))
        if module.next_sentence and kind.pair:
            entries += (*linear("next/hidden", kind.pair[0]), *linear("next", kind.pair[1]))
            return names.under("backbone", *entries, tied=_tied(kind))
        return names.under("backbone", *entries, skip=(*no_pooler, *_UNREAD), tied=_tied(kind))
    if isinstance(module, Classifier):
        entries = (*linear("head/hidden", kind.labels[0]), *linear("head", kind.labels[1]))
        return names.under("backbone", *entries, skip=names.skip if "pooler" in kind.labels[0] else no_pooler)
    entries = linear("head", "qa_outputs" if isinstance(module, SpanFinder) else "classifier")
    if isinstance(module, Tagger) and module.hidden != "none":
        entries = (*linear("head/hidden", f"{_DETECT}.dense"), *linear("head", f"{_DETECT}.dense_prediction"))
    return names.under("backbone", *entries, skip=no_pooler)


def _tied(kind: Kind) -> tuple[tuple[str, str], ...]:
    """Return (copy, original) for the copies of the token embedding and of the output bias that files may hold."""
    tokens, bias = kind.body[0].name, kind.words[2]
    stem = bias.rpartition(".")[0]
    if kind in (DISTILBERT, ELECTRA):
        return ((f"{stem}.weight", tokens),)
    return ((f"{stem}.decoder.weight", tokens), (f"{stem}.decoder.bias", bias))
