"""One training step as a pure function: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, Loss, LossFn, Params, Updates
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
    once: in a mean of means, the weight of a token would depend on how full its microbatch is.

    Args:
        loss_fn: called with `combine(params, frozen)` and the number of the step; it may update frozen leaves.
        tx: optimiser; it gets the gradient of the trained leaves only.
        key: random key of the run; a step uses `fold_in(key, step)`, so a resumed run needs no stored key.
        accumulate: microbatches per step; the batch is split along its first axis.
        ema_decay: decay of the moving average of the parameters, if the state has one.
        combine: (trained, frozen) -> the model's parameters (`tree.merge`, LoRA's, a stack's).
        total: adds a tree over replicas; the identity under jit, `lax.psum` under pmap.

    Returns:
        A step with the metrics "loss", those of the loss function, "grad_norm", "skipped" (in a row) and "skip" (now).
        A step with a non-finite loss or gradient changes nothing but the counters.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(key, state.step)

        def objective(params: Params, part: Batch, rng: jax.Array) -> tuple[jax.Array, Loss]:
            loss = loss_fn(combine(params, state.frozen), part, rng, state.step)
            return loss.sum, loss

        grads_of = jax.value_and_grad(objective, has_aux=True)
        (_, loss), grads = total(_accumulate(grads_of, state.params, batch, rng, accumulate))
        safe = jnp.maximum(loss.weight, 1e-9)  # a batch of only padding has sum 0 and weight 0: zero gradient
        grads = jax.tree.map(lambda g: g / safe, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if state.ema is not None:
            decay = 0.0 if ema_decay is None else ema_decay
            ema = jax.tree.map(lambda mean, new: mean + (1 - decay) * (new - mean), state.ema, params)
        frozen = _updated(state.frozen, state.params, _means(loss.updates), finite)
        before = (state.params, state.opt_state, state.ema)
        keep = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state, ema), before)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new = TrainState(state.step + 1, keep[0], frozen, keep[1], keep[2], skipped)
        logged = {"loss": loss.sum / safe, **_means(loss.metrics), "grad_norm": norm}
        return new, {**logged, "skipped": skipped, "skip": ~finite}

    return step


def _means(sums: Updates) -> dict[str, jax.Array]:
    return {name: summed / jnp.maximum(weight, 1e-9) for name, (summed, weight) in sums.items()}


def _updated(frozen: Params, trained: Params, new: dict[str, jax.Array], finite: jax.Array) -> Params:
    """Return the frozen leaves with new values at some paths, or unchanged if the step is skipped.

    Raises:
        ConfigError: a path is a trained leaf, which only the optimiser may change, or does not exist.
    """
    if not new:
        return frozen
    leaves = tree.flatten(frozen)
    if others := sorted(new.keys() - leaves.keys()):
        if both := [path for path in others if path in tree.flatten(trained)]:
            raise ConfigError(f"the loss updates {both[:3]}, which are trained leaves: freeze them first")
        held = ", ".join(list(leaves)[:8])
        raise ConfigError(
            f"the loss updates {others[:3]}, which are not leaves of the state; the frozen leaves are {held}"
        )
    return tree.unflatten(leaves | {path: jnp.where(finite, value, leaves[path]) for path, value in new.items()})


def _accumulate(grads_of: Any, params: Params, batch: Batch, rng: jax.Array, parts: int) -> Any:
    """Add ((sum, Loss), gradient of the sum) over `parts` slices of the batch."""
    if parts == 1:
        return grads_of(params, batch, rng)
    split = jax.tree.map(lambda x: _interleave(x, parts), dict(batch))

    def add(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        piece, index = part
        sums = grads_of(params, piece, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, carry, sums), None

    shapes = jax.eval_shape(grads_of, params, jax.tree.map(lambda x: x[0], split), rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def _interleave(x: jax.Array, parts: int) -> jax.Array:
    """Split [B, ...] into [parts, B/parts, ...] so that every part has equally many rows of each device."""
    if x.shape[0] % parts:
        raise ConfigError(f"a batch of {x.shape[0]} rows cannot be accumulated in {parts} equal parts")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
