"""Small changes of a model or its parameters, of which the wrong variants of every family are made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fm_jax.core import tree
from fm_jax.core.types import Params


def cfg(model: Any) -> Any:
    """Return the config of a model, or of what a head stands on."""
    return getattr(model, "backbone", model).cfg


def change(model: Any, **changes: Any) -> Any:
    """Change fields of that config."""
    if hasattr(model, "backbone"):
        return model.clone(backbone=change(model.backbone, **changes))
    return model.clone(cfg=replace(model.cfg, **changes))


def part(model: Any, name: str, **changes: Any) -> Any:
    """Change fields of one part of that config, such as `attention`."""
    return change(model, **{name: replace(getattr(cfg(model), name), **changes)})


def swap(params: Params, one: str, two: str) -> Params:
    """Let the parameters of two path parts change places."""
    flat = tree.flatten(params)
    others = {path: path.replace(one, "?").replace(two, one).replace("?", two) for path in flat}
    assert any(path != other for path, other in others.items()), f"no parameter's path holds {one} or {two}"
    return tree.unflatten({path: flat[other] for path, other in others.items()})


def edit(params: Params, name: str, function: Callable[[Any], Any]) -> Params:
    """Change every parameter whose path holds `name`."""
    assert any(name in path for path in tree.flatten(params)), f"no parameter's path holds {name}"
    return tree.map_with_path(lambda path, leaf: function(leaf) if name in path else leaf, params)


def turned(kernel: Any) -> Any:
    """Transpose a kernel, or those of all layers."""
    return kernel.swapaxes(-1, -2)
