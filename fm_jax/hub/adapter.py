"""LoRA adapters in and out of the folder that `peft` writes: adapter_config.json and adapter_model.safetensors.

Its A [rank, in] and B [out, rank] are ours transposed, one pair a layer and matrix. Where the two forms differ:

- A fused projection (GPT-2's c_attn) has one adapter there; its parts q, k and v have one each here. Written, the
  parts' A stand beside each other and their B on the diagonal of one, at the rank of all parts together
  (`rank_pattern`, and `alpha_pattern`, so that the scale stays); parts that share A are written at their own rank.
  Read, such a diagonal is taken apart again; any other pair gives every part all of A and its columns of B: the same
  function, though in training each part then moves an A of its own.
- Here all adapters have one rank: smaller ones, and layers that have none, are filled up with zeros, which training
  leaves at zero. And one scale, alpha / rank: what another one is larger by (`alpha_pattern`) is multiplied into B.
- Its dropout belongs to training there, and is passed over.

Ours alone, without a public form, are kept by `peft/lora.py`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """What a folder holds, in the words of `peft/lora.py`: its trained tree, and the fields of its Config."""

    trained: Params  # {"lora": {path: {"a", "b"}}} and the leaves trained in full at their own paths
    rank: int
    alpha: float
    targets: tuple[str, ...]  # the adapted matrices
    trainable: tuple[str, ...]  # the leaves trained in full
    base: str  # the checkpoint that the folder says it belongs to, or ""


def load(folder: str | Path, module: nn.Module, *, ignore: Iterable[str] = ()) -> Adapter:
    """Read the adapters of a model.

    Args:
        folder: as `peft` writes it.
        module: the model that they belong to, with its head: a family of the hub.
        ignore: fields of adapter_config.json that are unknown here and change no number.

    Raises:
        CheckpointError: missing or damaged files, another kind of adapter (DoRA, biases, embeddings …), or adapters
            that do not fit the model, all in one message.
    """
    folder = Path(folder)
    config = Fields.open(folder / CONFIG)
    sizes = Sizes.read(config)
    base = config.take("base_model_name_or_path", str, "")
    config.close(ignore)
    weights = safetensors.open_file(folder / TENSORS)
    names, leaves = families.writing(module).table(module), tree.flatten(families.abstract(module))
    pairs, full = _sort(weights, names, _bare(module))
    found = low_rank.ours(pairs, sizes, weights, low_rank.matrices(names, leaves))
    rank = max((a.shape[1] for layers in found.values() for a, _ in layers.values()), default=sizes.rank)
    adapters = {path: low_rank.stacked(layers, leaves[path].shape, rank) for path, layers in found.items()}
    whole = _whole(full, weights, names, leaves)
    kept = set(tree.flatten(whole))
    if both := sorted(adapters.keys() & kept):
        raise CheckpointError(f"{weights.where}: {', '.join(both)} has an adapter and is saved whole")
    flat = {f"{path}/{part}": x for path, pair in adapters.items() for part, x in pair.items()}
    alpha = sizes.alpha if rank == sizes.rank and not sizes.root else sizes.scale * rank
    targets, trainable = (tuple(map(re.escape, sorted(paths))) for paths in (adapters, kept))
    return Adapter({"lora": tree.unflatten(flat), **whole}, rank, alpha, targets, trainable, base)


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
        folder: must not exist yet.
        module: the model that they were trained for, with its head: a family of the hub.
        trained: as `peft/lora.py` has it.
        rank: of the config that they were trained with.
        alpha: of the same config; A B is multiplied by alpha / rank.
        base: the checkpoint that they belong to, for the reader: `peft` opens it by this name.
        revision: of that name.

    Raises:
        CheckpointError: the folder exists, or something was trained that `peft` cannot say.
    """
    family = families.writing(module)
    pretrained.check_form(module, {"pad_token_id": 0} | family.fields(module))
    names, leaves = family.table(module), tree.flatten(families.abstract(module))
    places, bare = low_rank.matrices(names, leaves), _bare(module)
    pairs = {name.removeprefix(bare): pair for name, pair in low_rank.theirs(trained.get("lora", {}), places)}
    full = {name.removeprefix(bare): x for name, x in _kept(trained, names, leaves)}
    # of RoBERTa's kind of head peft saves all, whether told to or not
    saved = sorted({re.sub(r"^classifier\..*", "classifier", name.rpartition(".")[0]) for name in full})
    if both := [name for name in pairs if any(f"{name}.".startswith(f"{other}.") for other in saved)]:
        raise CheckpointError(f"{', '.join(both)} was trained in full and has an adapter; peft can have only one")
    tensors = {f"{name}.lora_A.weight": a.T for name, (a, _) in pairs.items()}
    tensors |= {f"{name}.lora_B.weight": b.T for name, (_, b) in pairs.items()} | full
    tensors = {_BEFORE + name: np.ascontiguousarray(x) for name, x in tensors.items()}
    words = _words({name: a.shape[1] for name, (a, _) in pairs.items()}, places, bare)
    other = {word: size for word, size in words.items() if size != rank}
    data = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if _architecture(module).endswith(end)), None),
        "base_model_name_or_path": str(base) or None,
        "revision": revision,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": other,
        "alpha_pattern": {word: _number(alpha * size / rank) for word, size in other.items()},
        "target_modules": sorted(words),
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
    """Some of the tensors of a file under other names; implements `weights.Weights`."""

    where: str
    weights: Weights
    names: Mapping[str, str]  # ours -> the file's

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return dtype and shape of each."""
        return {name: self.weights.specs[stored] for name, stored in self.names.items()}

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of one."""
        return self.weights.read(self.names[name], index, out)


def _sort(weights: Weights, names: Table, bare: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return {matrix: {"A" or "B": stored name}} and {tensor saved whole: stored name}, under the table's names."""
    pairs, full, problems = dict[str, dict[str, str]](), dict[str, str](), list[str]()
    for stored in weights.specs:
        name = bare + stored.removeprefix(_BEFORE).removeprefix(bare)
        if not stored.startswith(_BEFORE):
            problems.append(f"{stored}: not below {_BEFORE}")
        elif match := re.fullmatch(r"(.*)\.lora_([AB])\.weight", name):
            pairs.setdefault(match[1], {})[match[2]] = stored
        elif "lora_" in name:
            problems.append(f"{stored}: an adapter of another kind")
        else:
            full[names.current(name)] = stored
    problems += [f"{name}: lora_A or lora_B is missing" for name, pair in pairs.items() if len(pair) < 2]
    if problems:
        raise CheckpointError(f"{weights.where} does not hold LoRA's pairs alone: {'; '.join(problems[:10])}")
    return {names.current(f"{name}.weight").removesuffix(".weight"): pair for name, pair in pairs.items()}, full


def _whole(full: Mapping[str, str], weights: Weights, names: Table, leaves: Mapping[str, Any]) -> Params:
    """Read the leaves that were trained in full."""
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


def _kept(trained: Params, names: Table, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors that were trained in full, under the table's names."""
    full = {path: leaf for path, leaf in tree.flatten(trained).items() if not path.startswith("lora/")}
    for path, leaf in full.items():
        if path not in leaves or leaf.shape != leaves[path].shape:
            raise CheckpointError(f"{path} {list(leaf.shape)} was trained in full, but the model has no such leaf")
    for entry in names.entries:
        mates = [other.path for other in names.entries if other.name == entry.name and other.path in leaves]
        if entry.path in full and (frozen := [path for path in mates if path not in full]):
            raise CheckpointError(
                f"{entry.path} was trained in full and {', '.join(frozen)} was not, which {entry.name} holds too: peft "
                "trains all of it or nothing; give it an adapter"
            )
        if entry.path in full and not entry.name.endswith((".weight", ".bias")):
            raise CheckpointError(f"{entry.path} was trained in full, and {entry.name} is no module that peft can save")
    written = dict(table.write(names, tree.unflatten(full))) if full else {}
    _refuse_tied(written, names, "the trained tree")
    yield from written.items()


def _refuse_tied(full: Iterable[str], names: Table, where: str) -> None:
    """Raise for a table that the head is tied to: peft trains a copy of it, and leaves the head as it was."""
    if tied := sorted({original for _, original in names.tied} & set(full)):
        raise CheckpointError(f"{where}: {', '.join(tied)} was trained in full and is tied to the head, not so in peft")


def _words(ranks: Mapping[str, int], places: Mapping[str, Sequence[Place]], bare: str) -> dict[str, int]:
    """Return {what to call the matrices: rank}: the end of the name that all layers share, where it means only them."""
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        short = places[bare + name][0].entry.name.removesuffix(".weight").rpartition("{}.")[2].removeprefix(bare)
        meant = {other for other in map(str.removeprefix, places, cycle([bare])) if f".{other}".endswith(f".{short}")}
        found[short if "." in short and all(ranks.get(other) == rank for other in meant) else name] = rank
    return found


def _architecture(module: nn.Module) -> str:
    return families.writing(module).fields(module)["architectures"][0]


def _bare(module: nn.Module) -> str:
    """Return what the table's names begin with and those of a model without a head do not, or ""."""
    if not re.fullmatch(r".*(?<!LMHead)Model", _architecture(module)):
        return ""
    return families.writing(module).table(module).entries[0].name.partition(".")[0] + "."


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
