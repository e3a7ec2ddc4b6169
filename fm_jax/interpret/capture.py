"""Read and edit a model's activations by site name, on any family whose sites `layers/tap.py` lists."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax

from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params, Tapped
from fm_jax.layers.tap import STORED, Tap


def apply(model: nn.Module, params: Params, *inputs: Any, tap: Tap, **options: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Apply the model with a tap and return (its output, {site: activation}).

    Activations of sites inside the repeated block have the layer axis first: [L, …]. Pure: works under jit, vmap, grad.

    Raises:
        ConfigError: a name is not a site of this model, or the model did not reach an edited site.
    """
    check(model, tap.names())
    # Edited sites are read too, to prove that they were reached; the extra activations are dropped (free under jit).
    tap_all = tap.replace(read=tuple(sorted(tap.names())))
    out, kept = model.apply({"params": params}, *inputs, tap=tap_all, mutable=["taps"], **options)
    activations = _by_site(kept.get("taps", {}))
    if missing := tap.names() - activations.keys():
        raise ConfigError(f"the model did not reach the sites {', '.join(sorted(missing))} in this configuration")
    return out, {name: activations[name] for name in tap.read}


def shapes(model: nn.Module, params: Params, *inputs: Any, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return every site's shape and dtype without computing anything."""

    def trace(params: Params, *inputs: Any) -> dict[str, jax.Array]:
        tap = Tap(read=tuple(model.sites))
        _, kept = model.apply({"params": params}, *inputs, tap=tap, mutable=["taps"], **options)
        return _by_site(kept["taps"])

    return jax.eval_shape(trace, params, *inputs)


def check(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ConfigError, with the list of sites, for a name that is not a site of the model."""
    if not isinstance(model, Tapped):
        raise ConfigError(f"a {type(model).__name__} names no activations (it has no `sites`), so none can be read")
    sites = tuple(model.sites)
    if unknown := sorted(set(names) - set(sites)):
        raise ConfigError(f"unknown sites {', '.join(unknown)}; this model has {', '.join(sites)}")


def _by_site(taps: Any) -> dict[str, jax.Array]:
    """Return {site: activation}, dropping module paths: site names are unique."""
    leaves = jax.tree_util.tree_leaves_with_path(taps)
    return {path[-1].key.removeprefix(STORED): leaf for path, leaf in leaves}
