"""Open what an earlier stage left, a run of this project or a public checkpoint, and make a classifier of it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from fm_jax.core import types
from fm_jax.core.errors import CheckpointError, ConfigError, DataError
from fm_jax.core.types import Params
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.layers.readout import Hidden, Pool
from fm_jax.models.language import encoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.tasks.init import EarlierRun, open_run

Head = Literal["default", "mean", "last", "first"]


def load(
    source: str | Path, *, revision: str | None = None, dtype: Dtype | None = None, mesh: Mesh | None = None
) -> Pretrained:
    """Read the best checkpoint of a pretraining run (the last, if none was judged), or a folder of `transformers`.

    Args:
        source: work directory of an `lm_pretrain`, `bert_pretrain` or `t5_pretrain` run; or what `hub.pretrained.load`
            takes.
        revision: of a public name.
        dtype: of the computation, and of a folder's parameters; None is a run's own, and float32 for a folder.
        mesh: puts a folder's parameters in their shards; a run's go to the first local device.

    Raises:
        CheckpointError: nothing there, something damaged, a run that trained no language model, or no tokenizer.
    """
    if (run := open_run(source, revision)) is None:
        found = public.load(source, dtype=dtype or "float32", mesh=mesh, revision=revision)
        if found.tokenizer is None:
            raise CheckpointError(f"{source} has no tokenizer.json, so no text can be read; put the model's own there")
        return found
    found = of_run(run)
    return replace(found, module=public.computing(found.module, dtype)) if dtype else found


def of_run(run: EarlierRun) -> Pretrained:
    """Return the language model that a run of lm_, bert_, t5_pretrain or t5_translate trained.

    Raises:
        CheckpointError: a run of something else, or a tokenizer that is missing or does not fit.
    """
    module, params = run.model(), run.params()
    if isinstance(types.backbone(module), types.Featured):
        raise CheckpointError(f"{run.workdir} trained a {type(module).__name__}, which reads images and no text")
    try:
        tokenizer = tokenizers.load(run.workdir / "tokenizer")
        tokenizers.check_vocabulary(tokenizer, types.backbone(module).cfg.vocab_size)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return Pretrained(module, params, tokenizer)


def classifier(found: Pretrained, classes: tuple[str, ...], head: Head = "default") -> tuple[Classifier, Params]:
    """Return a classifier of texts on a pretrained model, and the part of its parameters that is pretrained.

    A decoder's states are averaged, or its last one is read; of an encoder the first, through its family's layer, or
    the mean. What is published as a classifier keeps its head where that tells the same classes apart; else, saying so,
    it starts with a new one. A pooler that was trained on pairs (next sentence) is kept too.

    Args:
        found: what `load` gives.
        classes: names of the classes to tell apart, in order.
        head: "default" is a published classifier's own, a decoder's mean, an encoder's first.

    Raises:
        ConfigError: a model or a head that cannot classify.
    """
    backbone, params = found.backbone()
    count, given = len(classes), {"backbone": params}
    if isinstance(found.module, Classifier) and head == "default":
        own = found.module
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in found.labels)
        if own.num_classes == count and (unnamed or found.labels == classes):
            return own, given | {"head": found.params["head"]}
        known, wanted = (", ".join(map(str, names[:8])) for names in (found.labels, classes))
        print(f"the head starts afresh: the model tells {own.num_classes} classes apart ({known}), not {wanted}")
        return own.clone(num_classes=count), given
    if isinstance(backbone, Decoder) and head != "first":
        how: Pool = "mean" if head == "default" else head
        return Classifier(backbone, count, how, bias=how != "last"), given  # as transformers has the last one's head
    if isinstance(backbone, Encoder) and head == "mean":
        return Classifier(backbone, count, "mean", backbone.cfg.dropout), given
    if isinstance(backbone, Encoder) and head != "last":
        hidden = _hidden(backbone.cfg)
        if hidden == "tanh" and "next" in found.params:
            given["head"] = {"hidden": found.params["next"]["hidden"]}
        return Classifier(backbone, count, "first", backbone.cfg.dropout, hidden), given
    if isinstance(backbone, Decoder):
        raise ConfigError("head first reads a state that has seen nothing of a decoder's text; choose mean or last")
    if isinstance(backbone, Encoder):
        raise ConfigError("head last reads a state in which no encoder sums a text up; choose first or mean")
    raise ConfigError(f"the model is of class {type(backbone).__name__}; only encoders and decoders classify texts")


def _hidden(cfg: encoder.Config) -> Hidden:
    """Return the activation between an encoder's first state and its classes, as its family is published."""
    if not cfg.num_types:
        return "relu"  # DistilBERT
    return "gelu" if cfg.embed_size and not cfg.shared else "tanh"  # ELECTRA; BERT, RoBERTa, ALBERT
