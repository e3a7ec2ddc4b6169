"""Rotary positions in a config.json, in the words of transformers 5 and of transformers 4.

Transformers 5 writes `rope_parameters`, with the base inside. Transformers 4, and much that was built on it, knows only
`rope_theta` and `rope_scaling`: of a file without them it reads base 10,000 and no scaling, and says nothing. So both
forms are written, and a file in which they contradict each other is refused.
"""

import math
from dataclasses import replace
from typing import Any

from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.hub.fields import Fields
from fm_jax.ops.positions import Rope, magnitude

_BASE = 10_000.0  # default of rope_theta, in every family here
_SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
# yarn: rotations below which a frequency is scaled fully, and above which it is not; llama3's have no defaults
_YARN = {"beta_slow": 1.0, "beta_fast": 32.0}


def read(fields: Fields) -> Rope:
    """Read the rotary positions of a config.json, in either form or in both.

    Raises:
        CheckpointError: a method that is not supported, or a field of it that is missing, unknown or out of range.
    """
    forms = {name: fields.take(name, dict, {}) for name in ("rope_parameters", "rope_scaling")}
    ropes = {name: _form(fields, name, data) for name, data in forms.items() if data}
    fields.skip("original_max_position_embeddings")
    if not ropes:
        return Rope(fields.take("rope_theta", float, _BASE))
    if len(set(ropes.values())) > 1:
        fields.refuse("rope_parameters and rope_scaling contradict each other; keep the one the model was trained with")
    return next(iter(ropes.values()))


def _form(fields: Fields, name: str, data: dict[str, Any]) -> Rope:
    """Read one of the two forms."""
    theirs = Fields(data, f"{fields.where}, {name}")
    base = theirs.take("rope_theta", float, fields.take("rope_theta", float, _BASE))
    if base != fields.take("rope_theta", float, base):
        fields.refuse(f"rope_theta {fields.data['rope_theta']} contradicts {base} in {name}; keep the right one")
    kind = theirs.take("rope_type", str, theirs.take("type", str, "default"))
    theirs.expect("type", kind)
    length, rope = fields.take("max_position_embeddings", int), Rope(base)
    if kind not in ("default", *_SCALINGS):
        raise CheckpointError(
            f"{fields.where}: rope_type {kind!r} is not supported, only default, {', '.join(_SCALINGS)}"
        )
    if kind == "linear":
        rope = Rope(base, "linear", theirs.take("factor", float))
    elif kind == "dynamic":
        rope = Rope(base, "dynamic", theirs.take("factor", float), length)
        theirs.expect("original_max_position_embeddings", length)
    elif kind != "default":
        rope = _from_original(fields, theirs, base, kind)
    theirs.expect("partial_rotary_factor", 1.0)
    theirs.close()
    return rope


def _from_original(fields: Fields, theirs: Fields, base: float, kind: str) -> Rope:
    """Read a method that knows the length of the original training, which may stand outside (as in Phi 3)."""
    length = fields.take("max_position_embeddings", int)
    outside = fields.take("original_max_position_embeddings", int, 0)
    original = theirs.take("original_max_position_embeddings", int, outside or length)
    if outside and original != outside:
        fields.refuse(f"original_max_position_embeddings {outside} contradicts {original} in the rotary positions")
    if kind == "llama3":
        low, high = (theirs.take(f"{which}_freq_factor", float) for which in ("low", "high"))
        return Rope(base, "llama3", theirs.take("factor", float), original, low, high)
    factor = theirs.take("factor", float, length / original if original > 0 else 1.0)
    if kind == "longrope":
        short, long = (_numbers(theirs, f"{which}_factor") for which in ("short", "long"))
        rope = Rope(base, "longrope", factor, original, short_factors=short, long_factors=long)
    else:
        low, high = (theirs.take(name, float, default) or default for name, default in _YARN.items())
        rope = Rope(base, "yarn", factor, original, low, high, truncate=theirs.take("truncate", bool, True))
    given = _attention_factor(theirs, rope)
    return rope if given == magnitude(rope) else replace(rope, attention_factor=given)


def _attention_factor(theirs: Fields, rope: Rope) -> float:
    """Return the factor of cos and sin that a config gives, itself or by yarn's `mscale`, or the method's own."""
    factor = theirs.take("attention_factor", float, magnitude(rope))
    scales = [theirs.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim") if rope.scaling == "yarn"]
    if not theirs.has("attention_factor") and scales and all(scales):  # one alone has no effect
        above, below = (0.1 * scale * math.log(rope.factor) + 1 for scale in scales)
        factor = above / below if below else 0.0
    if factor <= 0:
        raise CheckpointError(f"{theirs.where}: the attention factor is {factor}; it must be above 0")
    return factor


def _numbers(theirs: Fields, name: str) -> tuple[float, ...]:
    """Return a list of positive numbers."""
    values = theirs.take(name, list)
    if any(type(value) not in (int, float) or not 0 < value < 1e9 for value in values):
        raise CheckpointError(f"{theirs.where}: {name} {str(values)[:80]} is not a list of positive numbers")
    return tuple(float(value) for value in values)


def context(rope: Rope, length: int) -> int:
    """Return the longest context of a model whose max_position_embeddings is `length`.

    dynamic stretches beyond it, as far as its factor says; the other methods count the stretched length.

    Raises:
        ConfigError: so far that int32 cannot count the positions.
    """
    longest = rope.factor * length if rope.scaling == "dynamic" else length
    if longest >= 1 << 31:
        raise ConfigError(f"rope's factor {rope.factor} stretches {length} positions beyond 2^31")
    return int(longest)


def write(rope: Rope, longest: int) -> dict[str, Any]:
    """Return the fields of a config.json in both forms, for a model whose longest context is `longest`."""
    length = rope.original_length if rope.scaling == "dynamic" else longest
    both: dict[str, Any] = {"max_position_embeddings": length, "rope_theta": rope.base}
    if rope.scaling == "none":
        plain = {"rope_type": "default", "rope_theta": rope.base}
        return {**both, "rope_parameters": plain, "rope_scaling": None}
    method: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn", "longrope"):
        method["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        method |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.scaling == "yarn":
        method |= {"beta_slow": rope.low_frequency, "beta_fast": rope.high_frequency}
        method |= {} if rope.truncate else {"truncate": False}
    if rope.scaling == "longrope":
        method |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        both["original_max_position_embeddings"] = rope.original_length  # transformers 4 looks for it here alone
    if rope.attention_factor or rope.scaling == "longrope":  # of longrope, 4 and 5 derive it from other numbers
        method["attention_factor"] = magnitude(rope)
    return {
        **both,
        "rope_parameters": {**method, "rope_theta": rope.base},
        "rope_scaling": {**method, "type": rope.scaling},
    }
