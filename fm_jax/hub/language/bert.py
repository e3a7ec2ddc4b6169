"""Configs of BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA and ALBERT in transformers, with their heads."""

from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import backbone
from fm_jax.hub.example import Example, Size, text
from fm_jax.hub.fields import Fields
from fm_jax.hub.language import bert_names, heads
from fm_jax.hub.language.bert_names import ALBERT, DISTILBERT, ELECTRA, OF_TYPE, ROBERTA, Kind, kind_of
from fm_jax.layers.attention import AttentionConfig
from fm_jax.layers.mlp import MLPConfig
from fm_jax.layers.norm import NormConfig
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.encoder import Config, Encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.span import SpanFinder
from fm_jax.models.language.tagger import Tagger

KINDS = {name: kind.stem for name, kind in OF_TYPE.items()} | {"xlm-roberta": "XLMRoberta"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_WORDS = {"gelu_tanh": "gelu_new"}
table = bert_names.table


def module(fields: Fields) -> nn.Module:
    """Build the module of a config.json of one of these families, with the head that `architectures` names."""
    kind, stem = OF_TYPE[fields.kind], KINDS[fields.kind]
    encoder = Encoder(_distilbert(fields) if kind is DISTILBERT else _config(fields, kind))
    task = fields.architecture.removeprefix(stem)
    act, dropout = encoder.cfg.mlp.activation, _head_dropout(fields, kind, task)
    if task == "Model":
        fields.skip("tie_word_embeddings")
        return encoder
    if task == "ForMaskedLM" or (task == "ForPreTraining" and kind.pair):
        fields.expect("tie_word_embeddings", True)
        if kind in (ROBERTA, ELECTRA) and act != "gelu":
            fields.refuse(
                f"{fields.architecture} has gelu in its head, and {act} in its layers; only gelu in both is supported"
            )
        return MaskedLM(encoder, next_sentence=task == "ForPreTraining")
    fields.skip("tie_word_embeddings")
    if task == "ForPreTraining" and kind is ELECTRA:
        if act != "gelu":
            fields.refuse(f"a discriminator with {act} in its head is not supported, only with gelu")
        return Tagger(encoder, 1, hidden="gelu")
    if task == "ForSequenceClassification":
        return Classifier(encoder, heads.num_classes(fields), pool="first", dropout=dropout, hidden=kind.hidden)
    if task == "ForTokenClassification":
        return Tagger(encoder, heads.num_classes(fields), dropout)
    if task == "ForQuestionAnswering":
        return SpanFinder(encoder, dropout)
    raise CheckpointError(
        f"{fields.where}: architectures is {fields.architecture or 'empty'}; supported are {stem}Model and "
        f"{stem}For(MaskedLM, PreTraining, SequenceClassification, TokenClassification, QuestionAnswering)"
    )


def _config(fields: Fields, kind: Kind) -> Config:
    width, count = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    offset = fields.take("pad_token_id", int, 1) + 1 if kind is ROBERTA else 0
    fields.expect("is_decoder", False)
    fields.expect("is_encoder_decoder", False)
    fields.expect("position_embedding_type", "absolute")
    # written by the first TensorFlow checkpoints, and never read
    pooler = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
    fields.skip("directionality", *(f"pooler_{word}" for word in pooler))
    embed, layers = 0, fields.take("num_hidden_layers", int)
    shared: bool | tuple[int, int] = kind is ALBERT
    if kind in (ELECTRA, ALBERT):
        embed = fields.take("embedding_size", int, 128)
        embed = 0 if embed == width and kind is ELECTRA else embed
        fields.skip(*(f"summary_{word}" for word in ("type", "use_proj", "activation", "last_dropout")))
    if kind is ALBERT:
        groups, inner = fields.take("num_hidden_groups", int, 1), fields.take("inner_group_num", int, 1)
        if groups < 1 or inner < 1 or groups > layers:
            raise CheckpointError(
                f"{fields.where}: num_hidden_groups {groups} and inner_group_num {inner} must be at least 1, with at "
                f"most as many groups as num_hidden_layers {layers}"
            )
        layers, shared = layers * inner, groups * inner == 1 or (groups, inner)
        fields.skip("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks")
    drop = 0.0 if kind is ALBERT else 0.1
    attention = fields.take("attention_probs_dropout_prob", float, drop)
    activation: Any = fields.choose("hidden_act", ACTIVATIONS, "gelu_new" if kind is ALBERT else "gelu")
    return Config(
        fields.take("vocab_size", int),
        fields.take("max_position_embeddings", int, 512) - offset,
        layers,
        width,
        AttentionConfig(count, count, heads.split(fields, width, count), causal=False, dropout=attention),
        MLPConfig(fields.take("intermediate_size", int), activation),
        NormConfig("layer", fields.take("layer_norm_eps", float, 1e-12)),
        num_types=fields.take("type_vocab_size", int, 2),
        embed_size=embed,
        position_offset=offset,
        shared=shared,
        dropout=fields.take("hidden_dropout_prob", float, drop),
    )


def _distilbert(fields: Fields) -> Config:
    width, count = fields.take("dim", int), fields.take("n_heads", int)
    fields.skip("sinusoidal_pos_embds", "tie_weights_")  # initialisation of the positions, which are stored
    fields.expect("is_encoder_decoder", False)
    activation: Any = fields.choose("activation", ACTIVATIONS, "gelu")
    attention = fields.take("attention_dropout", float, 0.1)
    return Config(
        fields.take("vocab_size", int),
        fields.take("max_position_embeddings", int, 512),
        fields.take("n_layers", int),
        width,
        AttentionConfig(count, count, heads.split(fields, width, count), causal=False, dropout=attention),
        MLPConfig(fields.take("hidden_dim", int), activation),
        num_types=0,
        dropout=fields.take("dropout", float, 0.1),
    )


def _head_dropout(fields: Fields, kind: Kind, task: str) -> float:
    """Return the dropout before a head's last layer, and read the dropout fields of the other heads."""
    if kind is DISTILBERT:
        own = {
            "ForSequenceClassification": fields.take("seq_classif_dropout", float, 0.2),
            "ForQuestionAnswering": fields.take("qa_dropout", float, 0.1),
        }
        return own.get(task, fields.take("dropout", float, 0.1))
    general = fields.take("hidden_dropout_prob", float, 0.0 if kind is ALBERT else 0.1)
    dropout = fields.take("classifier_dropout_prob" if kind is ALBERT else "classifier_dropout", float, general)
    return 0.0 if task == "ForQuestionAnswering" else dropout


def writes(module: nn.Module) -> bool:
    """Say whether a module is an encoder, or a head on one."""
    return isinstance(backbone(module), Encoder)


def example(module: nn.Module, rng: np.random.Generator, size: Size) -> Example:
    """Draw random inputs of an encoder or a head on one; with token types each row is a pair of texts."""
    cfg = backbone(module).cfg
    tokens, length, inside = text(cfg, rng, size)
    inputs = {"tokens": tokens}
    if isinstance(module, Encoder | MaskedLM):
        inputs["segments"] = inside.astype(np.int32)
    else:
        inputs["length"] = length
    if cfg.num_types > 1:
        second = np.arange(tokens.shape[1]) >= length[:, None] // 2
        inputs["types"] = (inside & second).astype(np.int32)
    return Example(inputs, inside)


def sites(module: nn.Module) -> dict[str, str]:
    """Return {their output: our site} to compare; only a model without a head returns its final hidden state."""
    names = {"embed": "embed", "layer": "block.resid_post"}
    return names | ({"final": "final"} if isinstance(module, Encoder) else {})


def fields(module: nn.Module) -> dict[str, Any]:
    """Return the config.json from which `module` builds an equal module."""
    kind, cfg = kind_of(module), backbone(module).cfg
    word = _WORDS.get(cfg.mlp.activation, cfg.mlp.activation)
    shared = {
        "model_type": next(name for name, other in OF_TYPE.items() if other is kind),
        "architectures": [kind.stem + _task(module)],
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length + cfg.position_offset,
        "tie_word_embeddings": True,
        **(heads.labels(_outputs(module)) if _outputs(module) > 1 else {}),
    }
    if kind is DISTILBERT:
        return shared | {
            "dim": cfg.d_model,
            "n_heads": cfg.attention.num_heads,
            "n_layers": cfg.num_layers,
            "hidden_dim": cfg.mlp.d_ff,
            "activation": word,
            "dropout": cfg.dropout,
            "attention_dropout": cfg.attention.dropout,
        }
    if kind is ROBERTA:
        shared["pad_token_id"] = cfg.position_offset - 1
    if kind in (ELECTRA, ALBERT):
        shared["embedding_size"] = cfg.embed_size or cfg.d_model
    groups, inner = cfg.shared if isinstance(cfg.shared, tuple) else (1, 1)
    if kind is ALBERT:
        shared |= {"num_hidden_groups": groups, "inner_group_num": inner}
    return shared | {
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.attention.num_heads,
        "num_hidden_layers": cfg.num_layers // inner,
        "intermediate_size": cfg.mlp.d_ff,
        "hidden_act": word,
        "layer_norm_eps": cfg.norm.epsilon,
        "type_vocab_size": cfg.num_types,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.attention.dropout,
    }


def _task(module: nn.Module) -> str:
    """Return the task in the class name, such as ForMaskedLM."""
    if isinstance(module, Encoder):
        return "Model"
    if isinstance(module, MaskedLM):
        return "ForPreTraining" if module.next_sentence else "ForMaskedLM"
    if isinstance(module, SpanFinder):
        return "ForQuestionAnswering"
    if isinstance(module, Tagger):
        return "ForPreTraining" if module.hidden == "gelu" else "ForTokenClassification"
    if isinstance(module, Classifier):
        return "ForSequenceClassification"
    raise CheckpointError(f"transformers has no class for a {type(module).__name__}; save its backbone instead")


def _outputs(module: nn.Module) -> int:
    """Return the number of classes or labels of the head; 0 if it has none."""
    if isinstance(module, Classifier):
        return module.num_classes
    return module.num_labels if isinstance(module, Tagger) else 0
