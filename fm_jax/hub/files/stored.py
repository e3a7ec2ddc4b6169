"""Open the weights of a checkpoint: one file, shards and their index, old Flax files, a GGUF file or Darknet's files.

Nothing that could run code is opened: a pickle is recognised by its content, whatever its name.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fm_jax.core import files, json_file
from fm_jax.core.errors import CheckpointError, shown
from fm_jax.hub.files import darknet, gguf, msgpack, safetensors
from fm_jax.hub.files.weights import Index, Spec, Weights

MAX_INDEX = 64_000_000  # bytes
_SHOWN = 10
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Kind(NamedTuple):
    """A file format of weights."""

    single: str
    shard: str  # regular expression of a shard's usual name; the index says which files are shards
    open_file: Callable[..., Weights]
    name: Callable[[str], str]  # name of a tensor in the index -> name in `specs`


KINDS = (
    Kind("model.safetensors", r"model-\d+-of-\d+\.safetensors", safetensors.open_file, str),
    Kind("flax_model.msgpack", r"flax_model-\d+-of-\d+\.msgpack", msgpack.open_file, msgpack.torch_name),
)
"""Supported formats in order of preference; the index has the single file's name plus ".index.json"."""


class Shards:
    """The tensors of several files together; implements `weights.Weights`."""

    def __init__(self, where: str, shards: Sequence[Weights]) -> None:
        """Join files that have no tensor name in common."""
        self.where = where
        self.specs: dict[str, Spec] = {name: spec for shard in shards for name, spec in shard.specs.items()}
        self._holder = {name: shard for shard in shards for name in shard.specs}

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of a tensor, from the file that holds it."""
        return self._holder[name].read(name, index, out)


def open_weights(folder: str | Path, *, allow_nonfinite: bool = False) -> Weights:
    """Return the tensors of a folder, unread: of safetensors, else of old Flax files; or of a GGUF or Darknet file.

    Symbolic links are followed anywhere, as the download cache needs; an index can only name files beside it.

    Args:
        folder: a folder written by `save_pretrained`, or what `gguf_file` or `darknet_files` finds.
        allow_nonfinite: allow infinities and NaNs; otherwise reading a tensor that holds one is an error.

    Raises:
        CheckpointError: no weights, only pickles, two sets of weights, or a damaged file or index.
    """
    folder = Path(folder)
    if (file := gguf_file(folder)) is not None:
        return gguf.open_file(sound(file), allow_nonfinite=allow_nonfinite)
    if (drawn := darknet_files(folder)) is not None:
        return open_darknet(drawn, allow_nonfinite=allow_nonfinite)[1]
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    there = sorted(path.name for path in folder.iterdir())
    for kind in KINDS:
        index = f"{kind.single}.index.json"
        shards = [name for name in there if re.fullmatch(kind.shard, name)]
        listed = listing(folder / index, kind) if index in there else {}
        both = kind.single in there and kind.single not in listed.values()
        if both and (listed or shards):
            other = index if listed else shards[0]
            raise CheckpointError(f"{folder} holds {kind.single} and {other}; remove the one that should not be read")
        if both:
            return kind.open_file(sound(folder / kind.single), allow_nonfinite=allow_nonfinite)
        if listed:
            return _sharded(folder / index, listed, kind, shards, allow_nonfinite)
        if shards:
            raise CheckpointError(
                f"{folder} holds {shards[0]} but no {index}, which lists them; fetch the folder again"
            )
    raise _nothing(folder, there)


def _sharded(index: Path, listed: Mapping[str, str], kind: Kind, there: list[str], allow_nonfinite: bool) -> Shards:
    """Open all shards of an index and compare their tensors with the index."""
    folder, names = index.parent, sorted(set(listed.values()))
    where = f"{index} does not fit its files"
    if absent := [name for name in names if not files.there(folder / name, CheckpointError)]:
        raise CheckpointError(f"{where}: {_some(absent)} missing; fetch the folder again")
    if stray := [name for name in there if name not in names]:
        raise CheckpointError(f"{where}: it does not name {_some(stray)}; remove it if it belongs to another model")
    shards = [kind.open_file(sound(folder / name), allow_nonfinite=allow_nonfinite) for name in names]
    problems = list(_differences(listed, dict(zip(names, shards, strict=True))))
    if problems:
        raise CheckpointError(f"{where}: {_some(problems)}; fetch the folder again")
    return Shards(str(index), shards)


def is_bare(folder: Path) -> bool:
    """Say whether a folder holds weights, or pickles, and no config.json."""
    there = [path.name for path in folder.iterdir()]
    weights = (name == kind.single or re.fullmatch(kind.shard, name) for kind in KINDS for name in there)
    return "config.json" not in there and (any(weights) or any(name.endswith(_PICKLES) for name in there))


def gguf_file(source: Path) -> Path | None:
    """Return the GGUF file that a path is, or that a folder holds instead of config.json and weights; None for others.

    Raises:
        CheckpointError: the folder holds several.
    """
    if gguf.is_gguf(source):
        return source
    others = ["config.json", *(kind.single + ending for kind in KINDS for ending in ("", ".index.json"))]
    if not source.is_dir() or any((source / name).exists() for name in others):
        return None
    found = sorted(path for path in source.iterdir() if path.suffix.lower() == gguf.SUFFIX)
    if len(found) > 1:
        raise CheckpointError(f"{source} holds {_some([file.name for file in found])}; give the path of one of them")
    return found[0] if found else None


class DarknetFiles(NamedTuple):
    """The files of a Darknet model."""

    cfg: Path
    weights: Path
    names: Path | None  # the classes, one a line


def darknet_files(source: Path) -> DarknetFiles | None:
    """Return the Darknet model that a path belongs to, or that a folder holds instead of config.json; None for others.

    Raises:
        CheckpointError: the folder holds several, or a part is missing.
    """
    others = ["config.json", *(kind.single + ending for kind in KINDS for ending in ("", ".index.json"))]
    if source.is_dir():
        if any((source / name).exists() for name in others):
            return None
        there = sorted(path for path in source.iterdir() if path.suffix.lower() == darknet.WEIGHTS)
        if not there:
            return None
        if len(there) > 1:
            raise CheckpointError(
                f"{source} holds {_some([file.name for file in there])}; give the path of one of them"
            )
        weights = there[0]
    elif source.is_file() and source.suffix.lower() in (darknet.CFG, darknet.WEIGHTS):
        weights = source if source.suffix.lower() == darknet.WEIGHTS else source.with_suffix(darknet.WEIGHTS)
    else:
        return None
    cfg = source if source.suffix.lower() == darknet.CFG else weights.with_suffix(darknet.CFG)
    for file in (cfg, weights):
        if not files.there(file, CheckpointError):
            raise CheckpointError(f"there is no {file}; a Darknet model is NAME.cfg and NAME.weights in one folder")
    listed = sorted(path for path in weights.parent.iterdir() if path.suffix.lower() == darknet.NAMES)
    same = [path for path in listed if path.stem == weights.stem] or listed
    return DarknetFiles(cfg, weights, same[0] if len(same) == 1 else None)


def open_darknet(model: DarknetFiles, *, allow_nonfinite: bool = False) -> tuple[darknet.Header, Weights]:
    """Return the header and the tensors, unread, of a Darknet model's .weights.

    Raises:
        CheckpointError: a file is malformed, or they do not belong together.
    """
    where = str(model.cfg)
    net, layers = darknet.layers(darknet.sections(darknet.read_text(model.cfg), where), where)
    listed = darknet.convolutions(net, layers, where)
    return darknet.open_weights(sound(model.weights), listed, allow_nonfinite=allow_nonfinite)


def _differences(listed: Mapping[str, str], shards: Mapping[str, Weights]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for file, weights in shards.items():
        for name in weights.specs:
            if name in seen:
                yield f"{name} is in {seen[name]} and in {file}"
            elif name not in listed:
                yield f"{name} is in {file} but not in the index"
            seen[name] = file
    for name, file in listed.items():
        if name not in shards[file].specs:
            yield f"{name} is not in {file}"


def listing(index: Path, kind: Kind) -> dict[str, str]:
    """Read {tensor: file} from an index; every file is a plain name, so it can only be one beside the index.

    Raises:
        CheckpointError: the index is damaged, or names something else.
    """
    weight_map = json_file.read(index, CheckpointError, most=MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, which names the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"(?!\.)[\w.\-]{1,255}", file, re.ASCII):
            raise CheckpointError(f"{index}: {shown(name)} is in {shown(file)}, which is not a file beside it")
    if len(named := {kind.name(name): file for name, file in weight_map.items()}) != len(weight_map):
        raise CheckpointError(f"{index} names a tensor twice")
    return named


def sound(file: Path) -> Path:
    """Return the file if it may be opened, or raise an error that says what it is instead."""
    if not files.there(file, CheckpointError):
        raise CheckpointError(f"{file} does not exist")
    try:
        kind = _disguise(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from None
    if kind == "pickle":
        raise CheckpointError(f"{file} is a pickle despite its name: {_CONVERT}")
    if kind:
        raise CheckpointError(f"{file} is {kind}, not the weights; fetch the file itself")
    return file


_CONVERT = (
    "a pickle can run code, so nothing was opened; if you trust it, load it with transformers and give the folder "
    "that save_pretrained writes (safetensors)"
)


# The public detectors' files have no config.json, and transformers has no class for them.
_CONVERT_BARE = (
    "a pickle can run code, so nothing was opened; if you trust it, convert it with the two lines "
    "`import torch, safetensors.torch; found = torch.load('{0}', map_location='cpu', weights_only=True)` and "
    "`safetensors.torch.save_file(found.get('model', found), 'model.safetensors')`, and give the folder of that file"
)


def _disguise(file: Path) -> str:
    """Return what a file is by its first bytes if it is not a weights file; "" if it may be one."""
    with file.open("rb") as opened:
        head = opened.read(32)
    if not head:
        return "empty"
    # torch files begin so; a safetensors file may begin with 80 02 too, but the last five bytes of its length are 0
    if head.startswith(b"PK\x03\x04") or (re.match(rb"\x80[\x02-\x05]", head) and any(head[3:8])):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer"
    return "an HTML page" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else ""


def _nothing(folder: Path, there: list[str]) -> CheckpointError:
    """Return the error for a folder without supported weights."""
    plain = [name for name in there if (folder / name).is_file()]
    if pickles := [name for name in plain if name.endswith(_PICKLES) or _disguise(folder / name) == "pickle"]:
        remedy = _CONVERT if "config.json" in there else _CONVERT_BARE.format(pickles[0])
        return CheckpointError(f"{folder} holds its weights only as pickles ({_some(pickles)}): {remedy}")
    what = _some(there) if there else "no files"
    if any(name.lower().endswith(gguf.SUFFIX) for name in there):
        what += "; give the path of a GGUF file itself to load it"
    return CheckpointError(f"{folder} has no model.safetensors; it has {what}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
