"""LoRA: low-rank adapters (Hu et al. 2022) as an operation on trees, W + (alpha / rank) A B for matrices by path.

The trained tree is {"lora": {path of W: {"a", "b"}}} plus the leaves trained in full, such as a new head, at their own
paths. Everything else is frozen. The model itself is unchanged: it is applied to `combine(cfg)(trained, frozen)`. So a
step temporarily holds the adapted matrices and their gradients, but no optimiser state for them.
"""

import difflib
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import files, json_file, tree
from fm_jax.core.config import from_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.core.types import Params
from fm_jax.optim import depth

ROOT = "lora"  # node of the adapters in the trained tree
FORMAT = "fm_jax.lora.1"  # format name in the file
_WORDS = ("rank", "alpha", "targets", "trainable")  # of the file's metadata, each a JSON text


@dataclass(frozen=True)
class Config:
    """Adapted matrices and the size of adapters; patterns are regular expressions over whole paths."""

    rank: int = 8
    alpha: float = 16.0  # the product A B is multiplied by alpha / rank
    targets: tuple[str, ...] = (r"(?:.*/)?attn/(?:q|v)/kernel",)  # matrices that get an adapter
    trainable: tuple[str, ...] = ()  # leaves trained in full besides the adapters, such as "head/.*"

    def __post_init__(self) -> None:
        """Check sizes and patterns."""
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha must be a finite number above 0, not {self.alpha}")
        if not self.targets:
            raise ConfigError("lora.targets is empty; name matrices, such as '.*attn/q/kernel'")
        for pattern in (*self.targets, *self.trainable):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None


def init(key: jax.Array, params: Params, cfg: Config) -> Params:
    """Initialise adapters: {"lora": {path: {"a": [(L,) in, rank], "b": [(L,) rank, out]}}} in float32.

    A is uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5, as in the reference code; the paper says Gaussian). Its key
    depends on its path, so it does not change with the other targets. B is zero, so the model starts unchanged.

    Raises:
        ConfigError: a target pattern matches nothing (the message names the nearest paths) or a leaf that is not a
            matrix.
    """
    if ROOT in params:
        raise ConfigError(f"the parameters already have adapters under {ROOT!r}; merge them before adding new ones")
    flat, adapters = tree.flatten(params), {}
    for path in _targets(flat, cfg):
        *stack, rows, columns = flat[path].shape
        bound = rows**-0.5
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapters[f"{path}/a"] = jax.random.uniform(own, (*stack, rows, cfg.rank), jnp.float32, -bound, bound)
        adapters[f"{path}/b"] = jnp.zeros((*stack, cfg.rank, columns), jnp.float32)
    return {ROOT: tree.unflatten(adapters)}


def split(key: jax.Array, params: Params, cfg: Config) -> tuple[Params, Params]:
    """Return (trained, frozen): new adapters and the leaves of `cfg.trainable`; all other leaves.

    Raises:
        ConfigError: as `init`, or a pattern of `trainable` matches nothing or a target.
    """
    adapters = init(key, params, cfg)
    full, frozen = tree.partition(params, cfg.trainable)
    if both := sorted(set(_pairs(adapters)) & set(tree.flatten(full))):
        raise ConfigError(f"{', '.join(both[:5])}: both in lora.targets and in lora.trainable; choose one")
    return {**adapters, **full}, frozen


def combine(cfg: Config) -> Callable[[Params, Params], Params]:
    """Return the function (trained, frozen) -> the model's parameters.

    It is differentiable in both and works under jit, grad, vmap and any sharding; other leaves are passed through
    uncopied. It raises ValueError if an adapter's matrix is missing or a leaf is in both trees.
    """

    def parameters(trained: Params, frozen: Params) -> Params:
        full = {name: node for name, node in trained.items() if name != ROOT}
        return _add(tree.merge(full, frozen), trained, cfg.alpha / cfg.rank)

    return parameters


def merge(trained: Params, frozen: Params, cfg: Config) -> Params:
    """Merge the adapters into the weights: ordinary parameters, exactly those that were trained with."""
    return combine(cfg)(trained, frozen)


def unmerge(params: Params, trained: Params, cfg: Config) -> Params:
    """Subtract the adapters from merged parameters: the frozen tree, up to rounding (1e-6 in float32)."""
    full = tree.flatten({name: node for name, node in trained.items() if name != ROOT})
    base = tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if path not in full})
    return _add(base, trained, -cfg.alpha / cfg.rank)


def shardings(trained: Params, base: Params) -> Params:
    """Return the trained tree's shardings from those of the model's parameters.

    A is split along `in` and B along `out` like their matrix; the rank is never split.

    Args:
        trained: the trained tree, arrays or abstract.
        base: the NamedSharding of every leaf of the model's parameters.
    """
    where = tree.flatten(base)

    def place(path: str, leaf: Any) -> NamedSharding:
        if not path.startswith(f"{ROOT}/"):
            return where[path]
        target, _, part = path.removeprefix(f"{ROOT}/").rpartition("/")
        axes = (*where[target].spec, *(None,) * leaf.ndim)[: leaf.ndim]
        kept = (*axes[:-1], None) if part == "a" else (*axes[:-2], None, axes[-1])
        return NamedSharding(where[target].mesh, PartitionSpec(*kept))

    return tree.map_with_path(place, trained)


def check(trained: Params, params: Params) -> None:
    """Raise ValueError, naming the leaf, if an adapter or fully trained leaf does not match the model's parameters."""
    flat = tree.flatten(params)
    for path, (a, b) in _pairs(trained).items():
        if path not in flat:
            raise ValueError(f"{path} has an adapter, but the model has no such leaf")
        fits = depth.rank(path, flat[path]) == 2 and a.shape[-1] == b.shape[-2]
        if not fits or (*a.shape[:-1], b.shape[-1]) != flat[path].shape or b.shape[:-2] != a.shape[:-2]:
            raise ValueError(
                f"{path} is {list(flat[path].shape)}; adapters of {list(a.shape)} and {list(b.shape)} do not match"
            )
    for path, leaf in tree.flatten({name: node for name, node in trained.items() if name != ROOT}).items():
        if path not in flat:
            raise ValueError(f"{path} was trained in full, but the model has no such leaf")
        if leaf.shape != flat[path].shape:
            raise ValueError(f"{path} is {list(flat[path].shape)}, but {list(leaf.shape)} was trained")


def save(path: str | Path, trained: Params, cfg: Config) -> None:
    """Write the trained tree (adapters and fully trained leaves) and the config, atomically.

    Arrays must be fully addressable in this process.

    Raises:
        CheckpointError: the file cannot be written; ResourceError if no space is left.
    """
    from safetensors import numpy as stored

    # safetensors writes a non-contiguous array's memory unchanged, which is wrong
    flat = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in tree.flatten(trained).items()}
    words = {"rank": cfg.rank, "alpha": cfg.alpha, "targets": cfg.targets, "trainable": cfg.trainable}
    data = stored.save(flat, metadata={"format": FORMAT, **{name: json.dumps(word) for name, word in words.items()}})
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with files.writing(path, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def load(path: str | Path, params: Params) -> tuple[Params, Config]:
    """Read (trained tree, config) and check that they match the model.

    Args:
        path: a file written by `save`.
        params: the whole model's parameters, arrays or abstract; only their shapes are used.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or does not match; the message names the leaf.
    """
    from safetensors import SafetensorError, safe_open

    if not files.there(path, CheckpointError):
        raise CheckpointError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            words = file.metadata() or {}
            names = file.keys()
            flat = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {error}") from None
    if words.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not an adapter file of fm_jax: its format is {words.get('format')!r}, not {FORMAT!r}"
        )
    try:
        known = {name: json_file.parse(words[name], f"{name} of {path}", CheckpointError) for name in _WORDS}
        cfg = from_dict(Config, known)
        trained = tree.unflatten(flat)
        check(trained, params)
    except (KeyError, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not match the model: {error}") from None
    for name, (a, _) in _pairs(trained).items():
        if a.shape[-1] != cfg.rank:
            raise CheckpointError(f"{path}: the adapter of {name} has rank {a.shape[-1]}, but the file says {cfg.rank}")
    return trained, cfg


def _targets(flat: dict[str, Any], cfg: Config) -> list[str]:
    """Return the paths that the targets match, sorted."""
    matched: set[str] = set()
    for pattern in cfg.targets:
        paths = {path for path in flat if re.fullmatch(pattern, path)}
        if not paths:
            plain = re.sub(r"[^\w/]", "", pattern)
            near = difflib.get_close_matches(plain, list(flat), n=3, cutoff=0.0)
            raise ConfigError(f"lora target {pattern!r} matches no parameter; the nearest are {', '.join(near)}")
        for path in sorted(paths):
            if depth.rank(path, flat[path]) != 2:
                leaf = f"{path} {list(flat[path].shape)}, which has {depth.rank(path, flat[path])} axes per layer"
                raise ConfigError(f"lora target {pattern!r} matches {leaf}; only matrices can have adapters")
        matched |= paths
    return sorted(matched)


def _pairs(trained: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return {path of the matrix: (A, B)}."""
    flat = tree.flatten(trained.get(ROOT, {}))
    paths = {path.rpartition("/")[0] for path in flat}
    if odd := flat.keys() ^ {f"{path}/{part}" for path in paths for part in "ab"}:
        raise ValueError(f"an adapter needs exactly two leaves, a and b; wrong are {', '.join(sorted(odd)[:5])}")
    return {path: (flat[f"{path}/a"], flat[f"{path}/b"]) for path in sorted(paths)}


def _add(base: Params, trained: Params, scale: float) -> Params:
    """Return `base` with scale * A B added to the adapted matrices."""
    flat = tree.flatten(base)
    for path, (a, b) in _pairs(trained).items():
        if path not in flat:
            raise ValueError(f"{path} has an adapter, but the parameters have no such leaf")
        # full precision even if products default to less: merged and unmerged weights must be equal
        delta = scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        flat[path] = (flat[path] + delta).astype(flat[path].dtype)
    return tree.unflatten(flat)
