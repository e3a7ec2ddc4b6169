"""Load and save Hugging Face checkpoints.

A checkpoint folder has the files that `save_pretrained` writes: config.json, model.safetensors (or shards and their
index), tokenizer.json, generation_config.json and, for an image model, preprocessor_config.json. A GGUF file holds all
of a language model's; a YOLOv3 is Darknet's NAME.cfg and NAME.weights. Arrays go straight from the file to their
shards; nothing in a folder is ever executed or unpickled.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from fm_jax.core import files, tree
from fm_jax.core.errors import CheckpointError, DataError
from fm_jax.core.types import Headed, Params, backbone
from fm_jax.data.packages import cache
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.hub import darknet_model, download, families, gguf_model, table
from fm_jax.hub import generation as generations
from fm_jax.hub import preprocessing as preprocessors
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import darknet, gguf, safetensors, stored
from fm_jax.hub.generation import Generation
from fm_jax.hub.preprocessing import Preprocessing
from fm_jax.layers.attention import AttentionConfig

_DECIDING = {("clip_text_model", "eos_token_id")}  # (model_type, field) that is the model's own, not its tokenizer's
_FLAX = ("parent", "name")  # of every module
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint, ready for `module.apply({"params": params}, …)`."""

    module: nn.Module
    params: Params
    tokenizer: Tokenizer | None  # None if the folder has no tokenizer.json
    labels: tuple[str, ...] = ()  # names of a classifier's classes, in order
    preprocessing: Preprocessing | None = None  # of an image model; None if the folder names none
    generation: Generation | None = None  # end tokens and settings of a language model; None if the folder names none
    header: darknet.Header | None = None  # of a Darknet model's .weights

    def backbone(self) -> tuple[nn.Module, Params]:
        """Return the model without its head, to fine-tune on a new task."""
        if isinstance(self.module, Headed):
            return self.module.backbone, self.params["backbone"]
        return self.module, {name: node for name, node in self.params.items() if name != "head"}


def load(
    source: str | Path,
    *,
    dtype: Dtype = "float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    ignore: Iterable[str] = (),
    shapes: bool = False,
) -> Pretrained:
    """Read a checkpoint folder, a GGUF file or a Darknet model, or download a public checkpoint by name and read it.

    Args:
        source: a local folder, a GGUF file, or a Darknet model's .cfg or .weights (or a folder with one of these and no
            config.json); or OWNER/NAME, if no such folder exists.
        dtype: dtype of the parameters and of the computation, whatever dtype the file has.
        mesh: device mesh to shard the parameters over (`core/sharding.py`); None puts all on the first local device.
        revision: commit, branch or tag of a checkpoint downloaded by name; the commit of a branch or tag is printed.
        ignore: unknown fields of config.json, of a GGUF file's metadata, or of a Darknet .cfg (as KIND.OPTION), that do
            not change the computation; or preprocessor_config.json or generation_config.json, to load the model without
            it.
        shapes: give the parameters' shapes and read no weights: enough for a run that is resumed.

    Raises:
        CheckpointError: anything missing, damaged, unsupported or unknown, before memory is allocated.
    """
    folder, ignore = find(source, revision), tuple(ignore)
    opened, drawn = _gguf(folder, ignore), darknet_model.find(folder)
    whole = opened or drawn
    config = whole.config if whole else _config(folder)
    family, module = families.build(config, ignore)
    alone = (generations.FILE,) if folder.is_file() else ()  # a GGUF file's neighbours may be of other models
    generation = None if _channels(module) else generations.read(folder, config, (*ignore, *alone))
    weights = whole.weights if whole else stored.open_weights(folder)
    module = computing(families.settled(family, module, weights), dtype)
    names = family.table(module)
    wanted = families.abstract(module, dtype, mesh)
    tokenizer = _tokenizer(folder, module, opened)
    preprocessing = _preprocessing(folder, module, config.kind, ignore)
    params = wanted if shapes else table.read(names, wanted, weights)
    header = drawn.header if drawn else None
    return Pretrained(module, params, tokenizer, _labels(config), preprocessing, generation, header)


def save(
    folder: str | Path,
    module: nn.Module,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    labels: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    generation: Generation | None = None,
    header: darknet.Header | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `transformers` (or Darknet: a YOLOv3) opens with equal results.

    It appears complete or not at all.

    Args:
        folder: new or empty folder to write.
        module: a model of a family that transformers has.
        params: the model's parameters; with several processes every one of them must hold all.
        tokenizer: written beside the weights, with the ids of its special tokens in config.json.
        labels: names of a classifier's classes.
        preprocessing: image preprocessing that the model expects.
        generation: written as it was read: its ids, null ones too, are in config.json instead of the tokenizer's.
        header: version and seen images of a Darknet model's .weights, as they were read.
        dtype: dtype of the stored weights (except running statistics, see `families.abstract`); None keeps each dtype.
        shard_bytes: a larger model is written as several files and an index.

    Raises:
        CheckpointError: the folder exists, the parts do not fit each other, or transformers has no class that
            computes the same.
    """
    family = families.writing(module)
    data = _fields(module, params, tokenizer, labels, preprocessing, generation)
    names = family.table(module)
    if darknet_model.writes(module):
        if dtype not in (None, "float32") or tokenizer or preprocessing or generation:
            raise CheckpointError("Darknet's files hold layers in float32 and labels; leave out the dtype and the rest")
        with appearing(folder) as part:
            darknet_model.write(part, module, table.write(names, params), labels, header)
        return
    specs = table.specs(names, params if dtype is None else families.abstract(module, dtype))
    blanks = table.blanks(names, specs)
    written = chain(
        ((name, array.astype(np.dtype(specs[name].dtype), copy=False)) for name, array in table.write(names, params)),
        ((name, np.zeros(spec.shape, spec.dtype)) for name, spec in blanks.items()),
    )
    data |= dict.fromkeys(("dtype", "torch_dtype"), dtype or _dtype(params))  # the second for transformers 4
    if not isinstance(family, families.Described):  # which is none of transformers
        data |= {"transformers_version": "5.0.0"}
    with appearing(folder) as part:
        safetensors.write(part, specs | blanks, written, shard_bytes=shard_bytes)
        (part / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save(part)
        if preprocessing is not None:
            preprocessors.write(part, preprocessing)
        if generation is not None:
            generations.write(part, generation)


def _fields(
    module: nn.Module,
    params: Params,
    tokenizer: Tokenizer | None,
    labels: Sequence[str],
    preprocessing: Preprocessing | None,
    generation: Generation | None,
) -> dict[str, Any]:
    """Return what config.json is to hold of the parts of a model, after all of them are checked."""
    data = families.writing(module).fields(module)
    ids = _special(tokenizer) | dict(generation.ids if generation else {})
    data |= {name: value for name, value in ids.items() if (data.get("model_type"), name) not in _DECIDING}
    if labels:
        if len(labels) != len(data.get("id2label", ())):
            raise CheckpointError(f"{len(labels)} labels for a model of {len(data.get('id2label', ()))} classes")
        data |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    check_form(module, data)
    _check_params(module, params)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, module)
    if preprocessing is not None:
        _check_preprocessing(preprocessing, module)
    return data


@contextlib.contextmanager
def appearing(folder: str | Path) -> Iterator[Path]:
    """Give a hidden folder to write into; rename it to `folder` at the end, or delete it after an error.

    Raises:
        CheckpointError: the folder exists already and is not empty, or it cannot be written.
        ResourceError: no space is left.
    """
    folder = Path(folder)
    files.check_target(folder, CheckpointError)
    part = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.part")
    try:
        with files.writing(folder, CheckpointError):
            part.mkdir(parents=True)
            yield part
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def find(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder or file of a checkpoint; download it first if `source` is a public name.

    Raises:
        CheckpointError: there is no such folder, and no such public checkpoint or no network.
    """
    folder = Path(source)
    if folder.is_dir() or gguf.is_gguf(folder) or stored.darknet_files(folder):
        if revision is not None:
            what = "a folder" if folder.is_dir() else "a file"
            raise CheckpointError(f"{folder} is {what} and has no revision {revision!r}; leave the revision out")
        return folder
    text = str(source)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or folder.is_file() or folder.suffix == gguf.SUFFIX:
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        remedy = cache.remedy(folder) or "; give the folder that holds config.json, or OWNER/NAME"
        raise CheckpointError(f"{folder} {what}{remedy}")
    return download.fetch(text, revision)


def computing(module: nn.Module, dtype: Dtype) -> nn.Module:
    """Return the module with another dtype for its computation."""
    if (bare := backbone(module)) is not module:
        return module.clone(backbone=computing(bare, dtype))
    return module.clone(cfg=_recast(module.cfg, dtype))


def _recast(cfg: Any, dtype: Dtype) -> Any:
    """Return a config with another dtype, and so every config inside it (those of two towers)."""
    changes: dict[str, Any] = {}
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name == "dtype":
            changes[field.name] = dtype
        elif is_dataclass(value):
            changes[field.name] = _recast(value, dtype)
    return replace(cfg, **changes)


def check_form(module: nn.Module, data: dict[str, Any]) -> None:
    """Raise unless the config to be written builds the same module: what it cannot express would be lost silently."""
    _, again = families.build(Fields(data, "the config to be written"))
    ours, theirs = dict(_form(module)), dict(_form(again))
    if lost := [
        f"{name} {ours.get(name)} (it has {theirs.get(name)})" for name in ours if ours[name] != theirs.get(name)
    ]:
        kind = data["architectures"][0]
        raise CheckpointError(
            f"transformers has no class for this model: {kind} is closest but does not support {'; '.join(lost)}"
        )


def _check_params(module: nn.Module, params: Params) -> None:
    """Raise unless names and shapes are those of the module's parameters."""
    ours, given = tree.flatten(families.abstract(module)), tree.flatten(params)
    problems = [f"{path} is missing" for path in ours if path not in given]
    problems += [f"{path} is not one of its parameters" for path in given if path not in ours]
    problems += [
        f"{path} is {list(given[path].shape)}, not {list(leaf.shape)}"
        for path, leaf in ours.items()
        if path in given and given[path].shape != leaf.shape
    ]
    if problems:
        raise CheckpointError(f"the parameters do not fit the {type(module).__name__}: {'; '.join(problems[:10])}")


def _form(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every field that changes the computation (not marked training or precision)."""
    if not is_dataclass(value):
        yield path, value
        return
    layers = getattr(value, "num_layers", 0)
    for field in fields(value):
        if field.name in _FLAX or field.metadata.keys() & {"training", "precision"}:
            continue
        part = getattr(value, field.name)
        if layers and isinstance(part, AttentionConfig):  # windows repeat over the layers: list one for each
            part = replace(part, windows=tuple(islice(cycle(part.windows), layers)))
        yield from _form(part, f"{path}.{field.name}" if path else field.name)


def _config(folder: Path) -> Fields:
    """Read config.json; without one, tell it from the weights, if they are of a family that has none in public."""
    file = folder / "config.json"
    told = families.described(stored.open_weights(folder)) if stored.is_bare(folder) else None
    return told or Fields.open(file)


def _gguf(source: Path, ignore: tuple[str, ...]) -> gguf_model.Opened | None:
    """Open a GGUF file; a tokenizer.json beside the one of a folder replaces the file's own tokenizer."""
    if (file := stored.gguf_file(source)) is None:
        return None
    try:
        return gguf_model.open_file(file, ignore, tokenizer=not _has_tokenizer(source))
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _has_tokenizer(source: Path) -> bool:
    return source.is_dir() and files.there(source / "tokenizer.json", CheckpointError)


def _tokenizer(folder: Path, module: nn.Module, opened: gguf_model.Opened | None) -> Tokenizer | None:
    """Read the folder's or GGUF file's tokenizer and check that the embedding has a row for each of its tokens."""
    tokenizer = opened.tokenizer if opened else None
    if _has_tokenizer(folder):
        try:
            tokenizer = tokenizers.load(folder)
        except DataError as error:
            raise CheckpointError(str(error)) from error
    if tokenizer is not None:
        _check_tokenizer(tokenizer, module)
    return tokenizer


def _check_tokenizer(tokenizer: Tokenizer, module: nn.Module) -> None:
    try:
        tokenizers.check_vocabulary(tokenizer, backbone(module).cfg.vocab_size)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _preprocessing(folder: Path, module: nn.Module, kind: str, ignore: tuple[str, ...]) -> Preprocessing | None:
    """Read the preprocessing of an image model."""
    if preprocessors.FILE in ignore or not _channels(module) or folder.is_file():
        return None
    try:
        return preprocessors.read(folder, kind, ignore)
    except CheckpointError as error:
        remedy = f"name {preprocessors.FILE} in ignore, or remove it from the folder"
        raise CheckpointError(f"{error}; to load the model without it, {remedy}") from error


def _check_preprocessing(preprocessing: Preprocessing, module: nn.Module) -> None:
    """Raise unless the preprocessed images have the channels and size that the model reads."""
    if (channels := _channels(module)) != 3:
        raise CheckpointError(f"preprocessing makes images of 3 channels; the {type(module).__name__} reads {channels}")
    patches = getattr(backbone(module).cfg, "patches", None)
    if patches and not patches.any_size and patches.image_size != (preprocessing.size, preprocessing.size):
        height, width = patches.image_size
        size = preprocessing.size
        raise CheckpointError(f"preprocessing makes images of size {size}, but the model reads {height} × {width}")


def _channels(module: nn.Module) -> int:
    """Return the number of channels of the images that a module reads; 0 if it reads no images."""
    return getattr(backbone(module).cfg, "in_channels", 0)


def _labels(config: Fields) -> tuple[str, ...]:
    names = config.data.get("id2label") or {}
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))}:
        raise CheckpointError(f"{config.where}: id2label {str(names)[:80]} does not name labels 0, 1, …")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _dtype(params: Params) -> str:
    return np.dtype(jax.tree.leaves(params)[0].dtype).name


def _special(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Return the token ids that generation and classifiers read from config.json; {} without a tokenizer."""
    if tokenizer is None:
        return {}
    names: dict[str, tokenizers.Role] = {"bos_token_id": "start", "eos_token_id": "end", "pad_token_id": "pad"}
    special_ids: dict[str, int] = {}
    for name, role in names.items():
        with contextlib.suppress(DataError):
            special_ids[name] = tokenizer.special(role)
    return special_ids
