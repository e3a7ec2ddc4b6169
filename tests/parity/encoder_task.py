"""What encoders and their heads are compared on: one padded batch, our numbers, and how far two answers lie apart.

No torch in here: the golden tests read it too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.layers.tap import Tap
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.span import SpanFinder
from fm_jax.objectives import classify, masked_lm, span, tag
from tests.parity.gradients import apart, steepest

VOCAB, TIME, LENGTHS, PLACES, LABELS = 40, 24, (24, 15, 6), 3, 5
INSIDE = np.arange(TIME) < np.array(LENGTHS)[:, None]


def batch(pad: int = 0, num_types: int = 2, labels: int = LABELS) -> dict[str, np.ndarray]:
    """Return right-padded rows with what every task asks of them; the same number of places in each row.

    No token is 0 or 1: torch gives a padding id's row no gradient, wherever the id stands.
    """
    rng = np.random.default_rng(1)
    rows, length = len(LENGTHS), np.array(LENGTHS, np.int32)
    tokens = np.where(INSIDE, rng.integers(2, VOCAB, (rows, TIME)), pad).astype(np.int32)
    places = np.stack([np.sort(rng.choice(n, PLACES, replace=False)) for n in LENGTHS]).astype(np.int32)
    start = (rng.integers(0, length)).astype(np.int32)
    return {
        "tokens": tokens,
        "length": length,
        "types": (INSIDE & (np.arange(TIME) >= length[:, None] // 3)).astype(np.int32) * (num_types > 1),
        "weights": INSIDE.astype(np.float32),
        "places": places,
        "targets": rng.integers(2, VOCAB, (rows, PLACES)).astype(np.int32),
        "not_next": np.array([1, 0, 0], np.int32),
        "label": rng.integers(0, labels, rows).astype(np.int32),
        "labels": rng.integers(0, labels, (rows, TIME)).astype(np.int32),
        "start": start,
        "end": (start + rng.integers(0, length - start)).astype(np.int32),
    }


def ours(model: Any, rows: Mapping[str, np.ndarray]) -> Any:
    """Return a jitted params -> (outputs, states [1 + L, B, T, D], loss and its gradients) of our model."""
    inputs = ("tokens", "length", "types") if model.backbone.cfg.num_types else ("tokens", "length")
    types = jnp.asarray(rows["types"]) if model.backbone.cfg.num_types else None
    loss_fn, fields = _loss(model, inputs), {name: jnp.asarray(field) for name, field in rows.items()}
    if isinstance(model, Classifier | SpanFinder):
        fields["weights"] = jnp.ones(len(LENGTHS))
    if types is None:
        fields.pop("types")
    if not isinstance(model, MaskedLM) or not model.next_sentence:
        fields.pop("not_next")
    tap = Tap(read=("embed", "block.resid_post"))

    def forward(params: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        variables, options = {"params": params}, {"tap": tap, "mutable": ["taps"]}
        if isinstance(model, MaskedLM):
            where = {"types": types, "segments": jnp.asarray(INSIDE, jnp.int32)}
            hidden, kept = model.apply(variables, fields["tokens"], **where, **options, method="hidden")
            outputs = {"words": model.apply(variables, hidden, method="logits")}
            if model.next_sentence:
                outputs["pair"] = model.apply(variables, hidden, method="pair")
        else:
            given = (fields["tokens"], fields["length"], types)
            found, kept = model.apply(variables, *given, **options)
            outputs = dict(zip(("start", "end"), found, strict=True)) if isinstance(found, tuple) else {"out": found}
        return outputs, {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept["taps"])}

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        outputs, read = forward(params)

        def mean(params: Any) -> jax.Array:
            total, weight, _ = loss_fn(params, fields, None)
            return total / weight

        loss, gradients = jax.value_and_grad(mean)(params)
        states = jnp.concatenate([read["site:embed"][None], read["site:block.resid_post"]])
        return {"outputs": outputs, "states": states, "loss": loss, "gradients": gradients}

    return compute


def _loss(model: Any, inputs: tuple[str, ...]) -> Any:
    if isinstance(model, MaskedLM):
        return masked_lm.masked_lm(model.apply, _given)
    if isinstance(model, SpanFinder):
        return span.span(model.apply, inputs)
    if isinstance(model, Classifier):
        return classify.softmax(model.apply, inputs)
    return (tag.replaced if model.hidden != "none" else tag.tag)(model.apply, inputs)


def _given(_: jax.Array, rows: Mapping[str, jax.Array]) -> masked_lm.Masked:
    """Ask for the batch's own places, and take nothing out."""
    return masked_lm.Masked(rows["tokens"], rows["places"], rows["targets"], jnp.ones(rows["places"].shape))


def distances(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences at real tokens, in units of the peer's standard deviation; a gradient's norm."""
    found = {}
    assert mine["outputs"].keys() == peer["outputs"].keys()
    for name, want in peer["outputs"].items():
        got = np.asarray(mine["outputs"][name])
        assert got.shape == want.shape
        if want.shape[:2] == INSIDE.shape:
            got, want = got[INSIDE], want[INSIDE]
        found[name] = float((np.abs(got - want) / want.std()).max())
    if "states" in peer:
        got, want = np.asarray(mine["states"])[:, INSIDE], peer["states"][:, INSIDE]
        assert got.shape == want.shape
        found["states"] = float((np.abs(got - want) / want.std(axis=(-2, -1), keepdims=True)).max())
    found["loss"] = apart(mine["loss"], peer["loss"])
    if "gradients" in peer:
        found["gradients"] = steepest(mine["gradients"], peer["gradients"])
    return found
