"""Optimisers from optax, with every rule applied to each layer of stacked leaves separately.

A leaf stacked [L, ...] is L parameters: norms, factored moments and orthogonalisation never mix layers, so a model
trains exactly as without stacking.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Params
from fm_jax.optim import depth

Name = Literal["adamw", "adam", "sgd", "lion", "adafactor", "lamb", "lars", "muon", "rmsprop"]

NO_DECAY = (r"(?:.*/)?bias", r"(?:.*/)?scale", r"(?:.*/)?embed/positions")

# The numbers that each optimiser reads, with their defaults.
USUAL: dict[str, dict[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "sgd": {"momentum": 0.9, "weight_decay": 0.0},
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
    "adafactor": {"eps": 1e-30, "weight_decay": 0.0},
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01},
    "lars": {"momentum": 0.9, "weight_decay": 0.0},
    "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "rmsprop": {"b2": 0.9, "momentum": 0.9, "eps": 1e-3, "weight_decay": 0.0},
}
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight_decay": ("finite and at least 0", lambda x: 0 <= x < math.inf),
    "b1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "b2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "eps": ("finite and above 0", lambda x: 0 < x < math.inf),
    "momentum": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "clip_norm": ("finite and above 0, or none", lambda x: 0 < x < math.inf),
    "layer_decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
}
RATED = ("lars", "rmsprop")  # optimisers whose momentum accumulates updates already multiplied by the rate
LARS_TRUST = 0.001  # a matrix's local rate is this × |weights| / |gradient|: You et al. 2017, sections 4, 5
MUON_RMS = 0.2  # root mean square of an update's entries, to match AdamW: Liu et al. 2025, section 2.2


@dataclass(frozen=True)
class Config:
    """The optimiser and its numbers; None means that optimiser's default (`USUAL`)."""

    name: Name = "adamw"
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None  # sgd, lars, muon, rmsprop
    nesterov: bool = False  # sgd: the update looks ahead along the momentum
    clip_norm: float | None = 1.0  # maximum global norm of the gradient; none: no clipping
    layer_decay: float = 1.0  # factor of the learning rate from one layer to the one below (`depth.multipliers`)
    no_decay: tuple[str, ...] = NO_DECAY  # paths without weight decay (and without LARS's ratio); vectors have none

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and numbers that the optimiser would ignore."""
        if self.name not in USUAL:
            raise ConfigError(f"optimizer.name must be one of {', '.join(USUAL)}, not {self.name!r}")
        for field, (wanted, fits) in RANGES.items():
            value = getattr(self, field)
            if value is None:
                continue
            if field not in ("clip_norm", "layer_decay") and field not in USUAL[self.name]:
                raise ConfigError(f"optimizer.{field} is not read by {self.name}; leave it unset")
            if not fits(value):
                raise ConfigError(f"optimizer.{field} must be {wanted}, not {value}")
        if self.nesterov and (self.name != "sgd" or not self.value("momentum")):
            raise ConfigError(f"optimizer.nesterov is read by sgd with a momentum; unset it for {self.name}")

    def value(self, field: str) -> float:
        """Return a number of the optimiser: the configured one, or its default."""
        chosen = getattr(self, field)
        return USUAL[self.name][field] if chosen is None else chosen


def make(cfg: Config, schedule: optax.ScalarOrSchedule, params: Params) -> optax.GradientTransformation:
    """Make the optimiser of a tree of trained parameters (arrays or abstract).

    Stages: clipping by global norm; the rule; weight decay; layer factors; minus the learning rate. Weight decay is
    decoupled and multiplied by the rate (Loshchilov & Hutter 2019), also for Adafactor, where optax omits the rate.
    For "adam", "sgd", "lars" and "rmsprop" it is the usual L2 penalty, added to the gradient first. LARS's momentum
    accumulates updates multiplied by the rate (You et al. 2017, algorithm 1); leaves without decay have no trust ratio.
    RMSProp's momentum does the same; its mean of squares starts at 1 and has eps under the root, as in TensorFlow.
    The state's structure depends only on `name` and the tree, so other numbers can resume from the same checkpoint.

    Args:
        cfg: the optimiser and its numbers.
        schedule: step -> learning rate. Adafactor's is relative: multiplied by each matrix's root mean square. Muon's
            updates are scaled to AdamW's size, so its matrices and the Adam group share one rate.
        params: the trained leaves under their final paths, which decide decay, depth and Muon's group.

    Raises:
        ConfigError: a pattern of `no_decay` (other than the default ones) matches nothing, or `layer_decay` is set
            and no leaf is stacked under `blocks`.
    """
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    shrink = optax.add_decayed_weights(cfg.value("weight_decay"), mask=decay_mask(params, cfg.no_decay))
    rule = _rule(cfg, params)
    middle = [shrink, rule] if cfg.name in (*RATED, "adam", "sgd") else [rule, shrink]
    if cfg.name == "lamb":
        middle.append(_per_layer(optax.scale_by_trust_ratio(), params))
    last = [optax.trace(cfg.value("momentum"))] if cfg.name in RATED else []
    rate = optax.scale_by_learning_rate(schedule)
    return optax.chain(clip, *middle, _scale_by_depth(params, cfg.layer_decay), rate, *last)


def decay_mask(params: Params, no_decay: tuple[str, ...] = NO_DECAY) -> Params:
    """Return a tree of bools: which leaves have weight decay.

    These are the leaves that are matrices within one layer (a bias stacked [L, D] is not) and match no pattern.
    """
    tree.select(params, [pattern for pattern in no_decay if pattern not in NO_DECAY])  # raises if one matches nothing

    def decays(path: str, leaf: Any) -> bool:
        return depth.rank(path, leaf) >= 2 and not any(re.fullmatch(pattern, path) for pattern in no_decay)

    return tree.map_with_path(decays, params)


def _rule(cfg: Config, params: Params) -> optax.GradientTransformation:
    """Return the transformation from gradient to direction, before decay and rate."""
    if cfg.name == "sgd":
        return optax.trace(cfg.value("momentum"), nesterov=cfg.nesterov)
    if cfg.name == "lars":
        trust = optax.scale_by_trust_ratio(trust_coefficient=LARS_TRUST)
        return _per_layer(trust, params, only=decay_mask(params, cfg.no_decay))
    if cfg.name == "rmsprop":
        return optax.scale_by_rms(cfg.value("b2"), cfg.value("eps"), initial_scale=1.0, eps_in_sqrt=True)
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.value("b1"), cfg.value("b2"))
    if cfg.name == "adafactor":
        # as in T5: no first moment, update clipped at root mean square 1, rate relative to the parameter's size
        steps = (
            optax.scale_by_factored_rms(epsilon=cfg.value("eps")),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
        return _per_layer(optax.chain(*steps), params)
    adam = optax.scale_by_adam(cfg.value("b1"), cfg.value("b2"), cfg.value("eps"))
    return _muon(cfg, adam, params) if cfg.name == "muon" else adam


def _muon(cfg: Config, adam: optax.GradientTransformation, params: Params) -> optax.GradientTransformation:
    """Orthogonalise the momentum of hidden matrices; use Adam for vectors, lookup tables and heads.

    Source: Jordan et al. 2024; the scale 0.2 * sqrt(max(in, out)) is Liu et al. 2025 (Moonlight), equation 4.
    """
    outside = (depth.EMBEDDINGS, depth.DISTANCES, depth.HEADS)

    def group(path: str, leaf: Any) -> str:
        hidden = depth.rank(path, leaf) == 2 and not any(re.fullmatch(pattern, path) for pattern in outside)
        return "muon" if hidden else "adam"

    # optax treats axes that are neither reduction nor output as independent matrices: here, the layers
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    orthogonalise = contrib.muon(
        learning_rate=-1.0,  # keeps the sign; the rate comes last in the chain
        beta=cfg.value("momentum"),
        eps=cfg.value("eps"),
        muon_weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: matrix, updates),
    )
    # `muon` multiplies by sqrt(max(1, out / in)) in every optax (`scale_by_muon` only in 0.2.6);
    # another sqrt(in) makes that sqrt(max(in, out)).
    resize = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * (MUON_RMS * u.shape[-2] ** 0.5), updates))
    labels = tree.map_with_path(group, params)
    return optax.partition({"muon": optax.chain(orthogonalise, resize), "adam": adam}, labels)


def _per_layer(
    rule: optax.GradientTransformation, params: Params, only: Params | None = None
) -> optax.GradientTransformation:
    """Apply a rule with norms or means of whole leaves to each layer of stacked leaves separately.

    optax treats a leaf as one block: LAMB's trust ratio and Adafactor's clipping and parameter scale would mix the
    layers of a stack, and Adafactor would factor a [L, D] bias across them once L and D reach 128. Leaves that are
    False in `only` are not changed.
    """

    def init(part: Params) -> Any:
        return jax.vmap(rule.init)(part) if jax.tree.leaves(part) else rule.init(part)

    def update(updates: Params, state: Any, part: Params | None = None) -> tuple[Params, Any]:
        each = jax.vmap(rule.update) if jax.tree.leaves(updates) else rule.update
        return each(updates, state, part)

    counts = tree.map_with_path(lambda path, leaf: depth.layers(path, leaf), params)
    groups = {count: optax.GradientTransformation(init, update) for count in set(jax.tree.leaves(counts)) if count}
    # one group per stack height, because vmap needs equal axis sizes
    rules = {f"layers_{count}": group for count, group in groups.items()} | {"layers_0": rule}
    labels = jax.tree.map(lambda count: f"layers_{count}", counts)
    if only is not None:
        rules["as_is"] = optax.identity()
        labels = jax.tree.map(lambda chosen, label: label if chosen else "as_is", only, labels)
    return optax.partition(rules, labels)


def _scale_by_depth(params: Params, decay: float) -> optax.GradientTransformation:
    """Multiply updates by their layer factors; at decay 1 the identity, with the same empty state."""
    if decay == 1:
        return optax.identity()
    if not any(depth.layers(path, leaf) for path, leaf in tree.flatten(params).items()):
        raise ConfigError(
            f"optimizer.layer_decay {decay} needs layers stacked under `blocks`, but there are none; set it to 1"
        )
    factors = depth.multipliers(params, decay)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors))
