"""Open what an earlier stage left, a run of this project or a public checkpoint, and make a classifier of it."""

import re
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
from jax.sharding import Mesh

from fm_jax.checkpoint import read
from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError, DataError
from fm_jax.core.types import Params
from fm_jax.data import tokenizer as tokenizers
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.layers.readout import Hidden, Pool
from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.masked_lm import MaskedLM

Head = Literal["default", "mean", "last", "first"]


def load(source: str | Path, *, dtype: Dtype | None = None, mesh: Mesh | None = None) -> Pretrained:
    """Read the best checkpoint of a pretraining run (the last, if none was judged), or a folder of `transformers`.

    Args:
        source: work directory of an `lm_pretrain` or `bert_pretrain` run; or what `hub.pretrained.load` takes.
        dtype: of the computation, and of a folder's parameters; None is a run's own, and float32 for a folder.
        mesh: puts a folder's parameters in their shards; a run's go to the first local device.

    Raises:
        CheckpointError: nothing there, something damaged, a run that trained no language model, or no tokenizer.
    """
    workdir = Path(source)
    # OWNER/NAME may be fetched; runs/NAME is a run that was never made, and so is what lacks in a folder that is there
    if not workdir.exists() and (workdir.parts[:1] == ("runs",) or workdir.parent.is_dir()):
        raise CheckpointError(f"{workdir} does not exist; give a pretraining run's work directory or a model's folder")
    if not (workdir / "checkpoints").is_dir() and not (workdir / "run.json").is_file():
        found = public.load(source, dtype=dtype or "float32", mesh=mesh)
        if found.tokenizer is None:
            raise CheckpointError(f"{source} has no tokenizer.json, so no text can be read; put the model's own there")
        return found
    checkpoints = workdir / "checkpoints"
    step = "best" if read.ranked(checkpoints) else "last"
    config, params = read.load_meta(checkpoints, step)["config"], read.load_params(checkpoints, step)
    module = _module(workdir, config.get("model"), params)
    try:
        tokenizer = tokenizers.load(workdir / "tokenizer")
        tokenizers.check_vocabulary(tokenizer, getattr(module, "backbone", module).cfg.vocab_size)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return Pretrained(public.computing(module, dtype) if dtype else module, params, tokenizer)


def _module(workdir: Path, config: Any, params: Params) -> nn.Module:
    """Return the model that a run's config and parameters are of."""
    try:
        if "backbone" not in params:
            return Decoder(from_dict(decoder.Config, config))
        backbone = Encoder(from_dict(encoder.Config, config))
        return MaskedLM(backbone, next_sentence="next" in params)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{workdir} is no run of lm_pretrain or bert_pretrain: {error}") from error


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
    raise ConfigError(f"the model is an {type(backbone).__name__}; only encoders and decoders classify texts")


def _hidden(cfg: encoder.Config) -> Hidden:
    """Return the activation between an encoder's first state and its classes, as its family is published."""
    if not cfg.num_types:
        return "relu"  # DistilBERT
    return "gelu" if cfg.embed_size and not cfg.shared else "tanh"  # ELECTRA; BERT, RoBERTa, ALBERT
