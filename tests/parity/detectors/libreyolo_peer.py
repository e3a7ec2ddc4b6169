"""libreyolo's modules, imported one by one: the package itself imports OpenCV and more that is not needed here."""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def imported(name: str) -> Any:
    """Import libreyolo.NAME with bare packages around it, whose __init__ files are not run."""
    if "libreyolo" not in sys.modules:
        spec = find_spec("libreyolo")
        assert spec is not None and spec.submodule_search_locations
        _bare("libreyolo", Path(spec.submodule_search_locations[0]))
    root, parts = Path(sys.modules["libreyolo"].__path__[0]), name.split(".")
    for depth in range(1, len(parts)):
        _bare(".".join(["libreyolo", *parts[:depth]]), root.joinpath(*parts[:depth]))
    return importlib.import_module(f"libreyolo.{name}")


def _bare(package: str, folder: Path) -> None:
    """Make a package of a folder's modules, unless it is there."""
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
