"""Open a pretrained language model (a run or a public checkpoint), and build a classifier on it."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
from jax.sharding import Mesh

from fm_jax.core import types
from fm_jax.core.errors import CheckpointError, ConfigError, DataError, printable
from fm_jax.core.types import Params
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.hub import families, generation
from fm_jax.hub import pretrained as public
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.layers.readout import Hidden, Pool
from fm_jax.models.language import encoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.encoder import Encoder
from fm_jax.tasks.init import EarlierRun, Init, open_run

Head = Literal["default", "mean", "last", "first"]


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    step: str = "best",
    dtype: Dtype | None = None,
    mesh: Mesh | None = None,
    ignore: Iterable[str] = (),
    shapes: bool = False,
) -> Pretrained:
    """Read a checkpoint of a run, or a public checkpoint.

    Args:
        source: work directory of a run on texts, a checkpoint folder, or OWNER/NAME.
        revision: commit, branch or tag of OWNER/NAME.
        step: checkpoint of a run: "best" (the last, if none was evaluated), "last" or a step number.
        dtype: computation dtype, and the dtype of a folder's parameters. None: a run's own; float32 for a folder.
        mesh: shards a folder's parameters; those of a run go to the first local device.
        ignore: unknown fields of a folder's config.json that do not change the computation.
        shapes: give the parameters' shapes and read no weights: enough for a run that is resumed.

    Raises:
        CheckpointError: the source is missing or damaged, its run is not a language model, or it has no tokenizer.
    """
    ignore = tuple(ignore)
    if (run := open_run(source, revision, step, ignore=ignore)) is None:
        how: Dtype = dtype or "float32"
        loaded = public.load(source, dtype=how, mesh=mesh, revision=revision, ignore=ignore, shapes=shapes)
        if loaded.tokenizer is None:
            raise CheckpointError(
                f"{source} has no tokenizer.json, which is needed to read text; copy the model's file there"
            )
        return loaded
    trained = of_run(run, shapes=shapes)
    return replace(trained, module=public.computing(trained.module, dtype)) if dtype else trained


def of_run(run: EarlierRun, *, shapes: bool = False) -> Pretrained:
    """Return the model that a run on texts trained, a classifier with its class names; `shapes` as in `load`.

    All of it comes from the checkpoint; the run's data, and the model that it started from, may be gone.

    Raises:
        CheckpointError: the run is not a language model, or its tokenizer or class names are missing or do not fit.
    """
    module = run.model()
    if isinstance(types.backbone(module), types.Featured):
        raise CheckpointError(f"{run.workdir} trained a {type(module).__name__}, which reads images, not text")
    try:
        tokenizer = tokenizers.load(run.folder_of("tokenizer"))
        tokenizers.check_vocabulary(tokenizer, types.backbone(module).cfg.vocab_size)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    labels = run.classes
    if isinstance(module, Classifier) and len(labels) != module.num_classes:
        raise CheckpointError(
            f"{run.workdir} names {len(labels)} classes for a classifier of {module.num_classes}; an earlier version "
            "wrote it: convert it with that version, or train it again"
        )
    params = families.abstract(module) if shapes else run.params()
    return Pretrained(module, params, tokenizer, labels, generation=generation.of_run(run.meta))


def kept(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files of a tokenizer as checkpoints keep them, from which `of_run` reads it."""
    return {f"tokenizer/{name}": text.encode() for name, text in tokenizer.files().items()}


def continued(init: Init, *needed: type[nn.Module], mesh: Mesh, resumed: bool) -> Pretrained | None:
    """Open the model that a pretraining goes on with; None if it starts from randomly initialised parameters.

    Args:
        init: the start.
        needed: classes of models that can go on.
        mesh: as of `load`.
        resumed: the run has a checkpoint of its own, so that no weights are read.

    Raises:
        ConfigError: the model is of another class.
        CheckpointError: as of `load`.
    """
    if init.from_ is None:
        return None
    found = load(init.from_, **init.options, mesh=mesh, shapes=resumed)
    if not isinstance(found.module, needed):
        names = " or ".join(kind.__name__ for kind in needed)
        kind = type(found.module).__name__
        raise ConfigError(f"--init.from {init.from_} is of class {kind}; this pretraining needs {names}")
    return found


def trained_form(own: Any, wanted: Any) -> Any:
    """Return a loaded model's config with another's settings of training: dropout, dtype and rematerialisation."""
    parts = {name: replace(getattr(own, name), dropout=getattr(wanted, name).dropout) for name in ("attention", "mlp")}
    return replace(own, **parts, dropout=wanted.dropout, dtype=wanted.dtype, remat=wanted.remat)


def inherited(earlier: Pretrained | None) -> dict[str, Any]:
    """Return what a run's checkpoints keep of the model it started from, as `of_run` reads it from their meta."""
    kept = earlier.generation if earlier else None
    return {"generation": kept.describe()} if kept else {}


def check_context(init: Init, asked: int, positions: int) -> None:
    """Refuse a training context longer than the positions of the model it starts from.

    Raises:
        ConfigError: `asked` exceeds `positions`.
    """
    if asked > positions:
        raise ConfigError(
            f"model.max_length {asked} exceeds the {positions} positions of {init.from_}; set at most {positions}"
        )


def classifier(pretrained: Pretrained, classes: tuple[str, ...], head: Head = "default") -> tuple[Classifier, Params]:
    """Return a text classifier on a pretrained model, and its pretrained parameters.

    The head reads the mean or the last state of a decoder; for an encoder the first state (through its family's pooling
    layer) or the mean. A published classifier keeps its head if its classes match; otherwise a new head is randomly
    initialised and a message says so. A pooling layer trained on next-sentence prediction is kept too.

    Args:
        pretrained: result of `load`.
        classes: class names, in order.
        head: "default": a published classifier's own, mean for a decoder, first for an encoder.

    Raises:
        ConfigError: the model or the head cannot classify texts.
    """
    backbone, params = pretrained.backbone()
    count, given = len(classes), {"backbone": params}
    if isinstance(pretrained.module, Classifier) and head == "default":
        own = pretrained.module
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in pretrained.labels)
        if own.num_classes == count and (unnamed or pretrained.labels == classes):
            return own, given | {"head": pretrained.params["head"]}
        known, wanted = (", ".join(map(str, names[:8])) for names in (pretrained.labels, classes))
        told = f"the head is randomly initialised: the model has {own.num_classes} classes ({known}), the data {wanted}"
        print(printable(told))
        return own.clone(num_classes=count), given
    if isinstance(backbone, Decoder) and head != "first":
        pool: Pool = "mean" if head == "default" else head
        # transformers has no bias in the head of the last state
        return Classifier(backbone, count, pool, bias=pool != "last"), given
    if isinstance(backbone, Encoder) and head == "mean":
        return Classifier(backbone, count, "mean", backbone.cfg.dropout), given
    if isinstance(backbone, Encoder) and head != "last":
        hidden = _hidden(backbone.cfg)
        if hidden == "tanh" and "next" in pretrained.params:
            given["head"] = {"hidden": pretrained.params["next"]["hidden"]}
        return Classifier(backbone, count, "first", backbone.cfg.dropout, hidden), given
    if isinstance(backbone, Decoder):
        raise ConfigError(
            "head first needs an encoder: a decoder's first state has not seen the text; choose mean or last"
        )
    if isinstance(backbone, Encoder):
        raise ConfigError(
            "head last needs a decoder: an encoder does not summarise the text in its last state; choose first or mean"
        )
    raise ConfigError(
        f"the model is of class {type(backbone).__name__}; a text classifier needs an encoder or a decoder"
    )


def _hidden(cfg: encoder.Config) -> Hidden:
    """Return the activation of the pooling layer in the encoder's family."""
    if not cfg.num_types:
        return "relu"  # DistilBERT
    return "gelu" if cfg.embed_size and not cfg.shared else "tanh"  # ELECTRA; BERT, RoBERTa, ALBERT
