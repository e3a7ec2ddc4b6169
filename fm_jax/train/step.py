"""One training step as a pure function: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import STATISTICS, Batch, LossFn, Metrics, Params
from fm_jax.train.state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Combine = Callable[[Params, Params], Params]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    accumulate: int = 1,
    ema_decay: float | None = None,
    combine: Combine = tree.merge,
    total: Callable[[Any], Any] = lambda sums: sums,
) -> Step:
    """Make the step; the loop jits it and donates the state.

    Sums and weights are added over microbatches and (by the partitioner, or by `total`) over devices, and divided
    once: a mean of means would weigh a token by how full its microbatch is.

    Args:
        loss_fn: called with `combine(params, frozen)`.
        tx: sees the gradient of the trained leaves only.
        key: of the run; a step's randomness is `fold_in(key, step)`, so a resumed run needs no stored key.
        accumulate: microbatches a step; the batch is split along its first axis.
        ema_decay: of the running mean of the parameters, if the state carries one.
        combine: how trained and frozen leaves make the model's parameters (`tree.merge`, LoRA's, a stack's).
        total: adds a tree over replicas; the identity under jit, `lax.psum` under pmap.

    Returns:
        A step whose metrics are "loss", the loss function's, "grad_norm", "skipped" (in a row), "skip" (this step).
        A step with a non-finite loss or gradient changes nothing but the counters.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(key, state.step)

        def objective(params: Params, part: Batch, rng: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            value, weight, metrics = loss_fn(combine(params, state.frozen), part, rng)
            return value, (weight, metrics)

        grads_of = jax.value_and_grad(objective, has_aux=True)
        sums = total(_accumulate(grads_of, state.params, batch, rng, accumulate))
        (value, (weight, metrics)), grads = sums
        safe = jnp.maximum(weight, 1e-9)  # a batch of nothing but padding has sum 0 and weight 0: a zero gradient
        grads = jax.tree.map(lambda g: g / safe, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if state.ema is not None:
            decay = 0.0 if ema_decay is None else ema_decay
            ema = jax.tree.map(lambda mean, new: mean + (1 - decay) * (new - mean), state.ema, params)
        means = {name: summed / jnp.maximum(part, 1e-9) for name, (summed, part) in metrics.items()}
        frozen, means = _running(state.frozen, means, finite)
        before = (state.params, state.opt_state, state.ema)
        keep = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state, ema), before)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new = TrainState(state.step + 1, keep[0], frozen, keep[1], keep[2], skipped)
        return new, {"loss": value / safe, **means, "grad_norm": norm, "skipped": skipped, "skip": ~finite}

    return step


def _running(frozen: Params, means: dict[str, jax.Array], finite: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
    """Put the running statistics among the metrics into the frozen leaves, and return the metrics without them."""
    new = {name.removeprefix(STATISTICS): value for name, value in means.items() if name.startswith(STATISTICS)}
    if not new:
        return frozen, means
    held = tree.flatten(frozen)
    if trained := sorted(new.keys() - held.keys()):
        raise ConfigError(f"running statistics {trained[:3]} are among the trained leaves: split them off first")
    held |= {path: jnp.where(finite, value, held[path]) for path, value in new.items()}
    return tree.unflatten(held), {name: mean for name, mean in means.items() if not name.startswith(STATISTICS)}


def _accumulate(grads_of: Any, params: Params, batch: Batch, rng: jax.Array, parts: int) -> Any:
    """Add ((sum, (weight, metrics)), gradient of the sum) over `parts` slices of the batch."""
    if parts == 1:
        return grads_of(params, batch, rng)
    split = jax.tree.map(lambda x: _interleave(x, parts), dict(batch))

    def add(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        piece, index = part
        found = grads_of(params, piece, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, carry, found), None

    shapes = jax.eval_shape(grads_of, params, jax.tree.map(lambda x: x[0], split), rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def _interleave(x: jax.Array, parts: int) -> jax.Array:
    """Split [B, ...] into [parts, B/parts, ...] so that every device's rows are shared out evenly over the parts."""
    if x.shape[0] % parts:
        raise ConfigError(f"a batch of {x.shape[0]} rows cannot be accumulated in {parts} equal parts")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
