"""Read and write LoRA adapters as a folder of `peft`: adapter_config.json and adapter_model.safetensors.

Its A [rank, in] and B [out, rank] are the transposes of ours, one pair a layer and matrix. The two formats differ:

- A fused projection (GPT-2's c_attn) has one adapter in peft; its parts q, k and v have one each here. To write, the
  parts' A are concatenated and their B form a block-diagonal B, at the sum of the parts' ranks (`rank_pattern`, and
  `alpha_pattern` to keep the scale); parts that share A are written at their own rank. To read, a block-diagonal B is
  split again; from any other pair every part gets all of A and its columns of B: the same function, but in training
  each part then updates its own A.
- Here all adapters have one rank: smaller ones, and layers without an adapter, are padded with zeros, which training
  leaves at zero. They also have one scale, alpha / rank: a different scale (`alpha_pattern`) is multiplied into B.
- The dropout of peft's config is a training setting and is ignored.
- If the head or the embedding is among the targets, peft also saves their base weights, which then replace the model's.
  An adapter of a head that is tied to the embedding changes the head alone: `untied` gives the model such a head.

`tasks/adapted.py` puts the adapters on a model; `peft/lora.py` saves adapters in our own format.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.types import Params
from fm_jax.hub import families, low_rank, pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import safetensors
from fm_jax.hub.files.weights import Index, Spec, Weights
from fm_jax.hub.low_rank import Place, Sizes
from fm_jax.hub.table import Table

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BEFORE = "base_model.model."  # every name in the file
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """The contents of a folder as `peft/lora.py` has them: the trained tree and the fields of its Config."""

    trained: Params  # {"lora": {path: {"a", "b"}}} and the fully trained leaves at their own paths
    rank: int
    alpha: float
    targets: tuple[str, ...]  # the adapted matrices
    trainable: tuple[str, ...]  # the fully trained leaves
    base: str  # the base model that the folder names, or ""
    replaced: Params = field(default_factory=dict)  # leaves under the adapters that the folder holds too


def load(folder: str | Path, module: nn.Module, *, ignore: Iterable[str] = ()) -> Adapter:
    """Read the adapters of a model.

    Args:
        folder: a folder written by `peft`.
        module: the base model with its head, of a family of the hub.
        ignore: unknown fields of adapter_config.json that do not change the computation.

    Raises:
        CheckpointError: missing or damaged files, an unsupported kind of adapter (DoRA, biases, embeddings …), or
            adapters that do not fit the model, in one message.
    """
    folder = Path(folder)
    config = Fields.open(folder / CONFIG)
    sizes = Sizes.read(config)
    base = config.take("base_model_name_or_path", str, "")
    config.close(ignore)
    weights = safetensors.open_file(folder / TENSORS)
    names, leaves = families.writing(module).table(module), tree.flatten(families.abstract(module))
    pairs, full = _sort(weights, names, _bare(module))
    by_path = low_rank.ours(pairs, sizes, weights, low_rank.matrices(names, leaves))
    rank = max((a.shape[1] for layers in by_path.values() for a, _ in layers.values()), default=sizes.rank)
    adapters = {path: low_rank.stacked(layers, leaves[path].shape, rank) for path, layers in by_path.items()}
    fully_trained = tree.flatten(_fully_trained(full, weights, names, leaves))
    replaced = {path: fully_trained.pop(path) for path in sorted(adapters.keys() & fully_trained.keys())}
    if both := [path for path in replaced if not _under(path, names, full)]:
        raise CheckpointError(
            f"{weights.where}: {', '.join(both)} has an adapter and is also saved in full; only one is supported"
        )
    flat = {f"{path}/{part}": x for path, pair in adapters.items() for part, x in pair.items()}
    alpha = sizes.alpha if rank == sizes.rank and not sizes.root else sizes.scale * rank
    targets, trainable = (tuple(map(re.escape, sorted(paths))) for paths in (adapters, fully_trained))
    trained = {"lora": tree.unflatten(flat), **tree.unflatten(fully_trained)}
    return Adapter(trained, rank, alpha, targets, trainable, base, tree.unflatten(replaced))


def untied(folder: str | Path, module: nn.Module, params: Params) -> tuple[nn.Module, Params]:
    """Return the model with a head of its own, a copy of the embedding, if the folder changes one of the two alone.

    Args:
        folder: a folder written by `peft`.
        module: the base model with its head.
        params: its parameters.

    Raises:
        CheckpointError: the folder is damaged, or this model cannot have a head of its own.
    """
    family = families.writing(module)
    tied = dict(family.table(module).tied)
    head = next((copy for copy in tied if copy.endswith("lm_head.weight")), None)
    if head is None or not getattr(getattr(module, "cfg", None), "tied", False):
        return module, params
    weights, own = safetensors.open_file(Path(folder) / TENSORS), {head, tied[head]}
    names = (re.sub(r"\.(?:lora_\w+|base_layer)\b.*", ".weight", name) for name in weights.specs)
    if own.isdisjoint(family.table(module).current(name.removeprefix(_BEFORE)) for name in names):
        return module, params
    apart = module.clone(cfg=replace(module.cfg, tied=False))
    entries = {entry.name: entry for entry in families.writing(apart).table(apart).entries}
    paths = tree.flatten(families.abstract(apart)).keys() - tree.flatten(params).keys()
    if head not in entries or paths != {entries[head].path}:
        raise CheckpointError(f"{weights.where} changes {head}, which is tied to {tied[head]} in this model")
    flat = tree.flatten(params)
    embedding = flat[next(entry.path for entry in family.table(module).entries if entry.name == tied[head])]
    return apart, tree.unflatten({**flat, entries[head].path: embedding.T})


def save(
    folder: str | Path,
    module: nn.Module,
    trained: Params,
    *,
    rank: int,
    alpha: float,
    base: str | Path = "",
    revision: str | None = None,
) -> None:
    """Write adapters as a folder that `peft` opens on the same base with equal results; it appears whole or not at all.

    Args:
        folder: new or empty folder to write.
        module: the base model with its head, of a family of the hub.
        trained: the trained tree of `peft/lora.py`.
        rank: rank of the LoRA config of the training.
        alpha: alpha of the same config; A B is multiplied by alpha / rank.
        base: name or path by which `peft` opens the base model.
        revision: revision of the base model.

    Raises:
        CheckpointError: the folder exists, or something was trained that `peft` cannot express.
    """
    family = families.writing(module)
    pretrained.check_form(module, {"pad_token_id": 0} | family.fields(module))
    names, leaves = family.table(module), tree.flatten(families.abstract(module))
    places, bare = low_rank.matrices(names, leaves), _bare(module)
    pairs = {name.removeprefix(bare): pair for name, pair in low_rank.theirs(trained.get("lora", {}), places)}
    full = {name.removeprefix(bare): x for name, x in _kept(trained, names, leaves)}
    # peft always saves all of a head like RoBERTa's
    saved = sorted({re.sub(r"^classifier\..*", "classifier", name.rpartition(".")[0]) for name in full})
    if both := [name for name in pairs if any(f"{name}.".startswith(f"{other}.") for other in saved)]:
        raise CheckpointError(f"{', '.join(both)} was fully trained and has an adapter; peft can have only one")
    tensors = {f"{name}.lora_A.weight": a.T for name, (a, _) in pairs.items()}
    tensors |= {f"{name}.lora_B.weight": b.T for name, (_, b) in pairs.items()} | full
    tensors = {_BEFORE + name: np.ascontiguousarray(x) for name, x in tensors.items()}
    targets = _targets({name: a.shape[1] for name, (a, _) in pairs.items()}, places, bare)
    other = {target: size for target, size in targets.items() if size != rank}
    data = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if _architecture(module).endswith(end)), None),
        "base_model_name_or_path": str(base) or None,
        "revision": revision,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": other,
        "alpha_pattern": {target: _number(alpha * size / rank) for target, size in other.items()},
        "target_modules": sorted(targets),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(not place.entry.axes for name in pairs for place in places[bare + name]),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with pretrained.appearing(folder) as part:
        specs = {name: Spec(x.dtype.name, x.shape) for name, x in tensors.items()}
        safetensors.write(part, specs, tensors.items())
        (part / "model.safetensors").rename(part / TENSORS)
        (part / CONFIG).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")


@dataclass
class _Renamed:
    """Some tensors of a file, renamed; implements `weights.Weights`."""

    where: str
    weights: Weights
    names: Mapping[str, str]  # new name -> name in the file

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return dtype and shape of every tensor."""
        return {name: self.weights.specs[stored] for name, stored in self.names.items()}

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of a tensor."""
        return self.weights.read(self.names[name], index, out)


def _sort(weights: Weights, names: Table, bare: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return {matrix: {"A" or "B": stored name}} and {fully trained tensor: stored name}, by names of the table."""
    pairs, full, problems = dict[str, dict[str, str]](), dict[str, str](), list[str]()
    for stored in weights.specs:
        name = bare + stored.removeprefix(_BEFORE).removeprefix(bare)
        if not stored.startswith(_BEFORE):
            problems.append(f"{stored}: the name does not begin with {_BEFORE}")
        elif match := re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name):
            pairs.setdefault(match[1], {})[match[2]] = stored
        elif match := re.fullmatch(r"(.*)\.base_layer\.(weight|bias)", name):
            full[names.current(f"{match[1]}.{match[2]}")] = stored
        elif "lora_" in name:
            problems.append(f"{stored}: this kind of adapter is not supported")
        else:
            full[names.current(name)] = stored
    problems += [f"{name}: lora_A or lora_B is missing" for name, pair in pairs.items() if len(pair) < 2]
    if problems:
        raise CheckpointError(f"{weights.where} does not hold pairs of LoRA matrices only: {'; '.join(problems[:10])}")
    return {names.current(f"{name}.weight").removesuffix(".weight"): pair for name, pair in pairs.items()}, full


def _fully_trained(full: Mapping[str, str], weights: Weights, names: Table, leaves: Mapping[str, Any]) -> Params:
    """Read the leaves that were fully trained."""
    if not full:
        return {}
    _refuse_tied(full, names, weights.where)
    entries = tuple(
        entry
        for entry in names.entries
        if entry.path in leaves and any(name in full for name in low_rank.names(entry, leaves[entry.path].shape))
    )
    wanted = tree.unflatten({entry.path: leaves[entry.path] for entry in entries})
    return table.read(Table(entries), wanted, _Renamed(weights.where, weights, full))


def _under(path: str, names: Table, full: Mapping[str, str]) -> bool:
    """Say whether a leaf is stored as the base weight under an adapter, as peft does for heads among the targets."""
    stored = {full[entry.name] for entry in names.entries if entry.path == path and entry.name in full}
    return bool(stored) and all(".base_layer." in name for name in stored)


def _kept(trained: Params, names: Table, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors that were fully trained, by their names in the table."""
    full = {path: leaf for path, leaf in tree.flatten(trained).items() if not path.startswith("lora/")}
    for path, leaf in full.items():
        if path not in leaves or leaf.shape != leaves[path].shape:
            raise CheckpointError(f"{path} {list(leaf.shape)} was fully trained, but the model has no such parameter")
    for entry in names.entries:
        mates = [other.path for other in names.entries if other.name == entry.name and other.path in leaves]
        if entry.path in full and (frozen := [path for path in mates if path not in full]):
            raise CheckpointError(
                f"{entry.path} was fully trained and {', '.join(frozen)} was not, but peft cannot train a part of the "
                f"tensor {entry.name} that holds both; give {entry.path} an adapter instead"
            )
        if entry.path in full and not entry.name.endswith((".weight", ".bias")):
            raise CheckpointError(
                f"{entry.path} was fully trained, but peft cannot save {entry.name}: it is not a module's weight"
            )
    written = dict(table.write(names, tree.unflatten(full))) if full else {}
    _refuse_tied(written, names, "the trained tree")
    yield from written.items()


def _refuse_tied(full: Iterable[str], names: Table, where: str) -> None:
    """Raise if an embedding tied to the head was fully trained: peft trains a copy and does not change the head."""
    if tied := sorted({original for _, original in names.tied} & set(full)):
        raise CheckpointError(
            f"{where}: {', '.join(tied)} was fully trained and is tied to the head; peft would untie them"
        )


def _targets(ranks: Mapping[str, int], places: Mapping[str, Sequence[Place]], bare: str) -> dict[str, int]:
    """Return {entry of target_modules: rank}: the suffix shared by all layers, if it matches only them, or the name."""
    targets: dict[str, int] = {}
    for name, rank in ranks.items():
        short = places[bare + name][0].entry.name.removesuffix(".weight").rpartition("{}.")[2].removeprefix(bare)
        meant = {other for other in map(str.removeprefix, places, cycle([bare])) if f".{other}".endswith(f".{short}")}
        targets[short if "." in short and all(ranks.get(other) == rank for other in meant) else name] = rank
    return targets


def _architecture(module: nn.Module) -> str:
    return families.writing(module).fields(module)["architectures"][0]


def _bare(module: nn.Module) -> str:
    """Return the prefix of the table's names that a model without a head does not have in its files, or ""."""
    if not re.fullmatch(r".*(?<!LMHead)Model", _architecture(module)):
        return ""
    return families.writing(module).table(module).entries[0].name.partition(".")[0] + "."


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
