from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.interpret import capture
from fm_jax.layers.tap import SITES, STACKED, Tap, visit
from fm_jax.models.language import decoder
from tests.close import close

L, B, T = 2, 2, 8
GPT = decoder.tiny()
CLEAN, CORRUPT = np.random.default_rng(0).integers(0, 96, (2, B, T), dtype=np.int32)


@cache
def params():
    model = decoder.Decoder(GPT)
    fresh = jax.jit(lambda key: meta.unbox(model.init(key, CLEAN)["params"]))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), fresh)


@cache
def runner(remat="none"):
    """Return the jitted (tokens, tap) -> (logits, read)."""
    model, weights = decoder.Decoder(replace(GPT, remat=remat)), params()
    return jax.jit(lambda tokens, tap: capture.apply(model, weights, tokens, tap=tap))


@cache
def read(which="clean"):
    return runner()(CLEAN if which == "clean" else CORRUPT, Tap(SITES))


def metric(logits):
    return logits[:, -1, 5].sum() - logits[:, -1, 9].sum()


def test_what_is_read_is_what_the_model_computed():
    _, at = read()
    assert {site: leaf.shape[0] for site, leaf in at.items()} == {s: L if s.startswith(STACKED) else B for s in SITES}
    close(at["block.resid_pre"][0], at["embed"])
    close(at["block.resid_pre"][1], at["block.resid_post"][0])
    close(at["block.resid_mid"], at["block.resid_pre"] + at["block.attn.out"])
    close(at["block.resid_post"], at["block.resid_mid"] + at["block.mlp.out"])
    close(at["block.mlp.act"], jax.nn.gelu(at["block.mlp.pre"]))
    scores = np.einsum("lbthk,lbshk->lbhts", at["block.attn.q"], at["block.attn.k"]) * 8**-0.5
    close(at["block.attn.scores"], scores)
    seen = np.exp(scores) * np.tril(np.ones((T, T)))
    close(at["block.attn.pattern"], seen / seen.sum(-1, keepdims=True))
    close(at["block.attn.z"], np.einsum("lbhts,lbshk->lbthk", at["block.attn.pattern"], at["block.attn.v"]))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_layers_reads_the_same(remat):
    logits, at = runner(remat)(CLEAN, Tap(SITES))
    close(logits, read()[0])
    close(at, read()[1])


def test_reading_changes_nothing_with_or_without_jit():
    model = decoder.Decoder(GPT)
    plain = model.apply({"params": params()}, CLEAN)
    logits, at = capture.apply(model, params(), CLEAN, tap=Tap(("block.attn.z", "final")))
    assert set(at) == {"block.attn.z", "final"}
    close(logits, plain)
    close(read()[0], plain)


def test_shapes_cost_no_computation_and_are_right():
    found = capture.shapes(decoder.Decoder(GPT), params(), CLEAN)
    assert {site: (leaf.shape, leaf.dtype) for site, leaf in found.items()} == {
        site: (leaf.shape, leaf.dtype) for site, leaf in read()[1].items()
    }


def overwrite(values, *sites, where=True):
    return Tap(put={site: (jnp.broadcast_to(where, values[site].shape), values[site]) for site in sites})


def test_putting_back_what_was_there_is_the_identity():
    logits, at = read()
    again, _ = runner()(CLEAN, overwrite(at, *SITES))
    close(again, logits)


def test_the_clean_stream_in_the_corrupt_run_restores_the_clean_output():
    clean, at = read()
    corrupt, _ = read("corrupt")
    assert np.abs(clean - corrupt).max() > 0.1
    run = runner()
    for layer in range(L):  # everything after it follows from the stream
        only = np.arange(L).reshape(-1, 1, 1, 1) == layer
        patched, _ = run(CORRUPT, overwrite(at, "block.resid_post", where=only))
        close(patched, clean)
    one = np.arange(T).reshape(1, -1, 1) == 3  # one position restores that position, no earlier one, not all
    patched, _ = run(CORRUPT, overwrite(at, "final", where=one))
    close(patched[:, 3], clean[:, 3])
    close(np.delete(patched, 3, axis=1), np.delete(corrupt, 3, axis=1))


@pytest.fixture(scope="module")
def slopes():
    """The gradient of the metric at every site, by an addition of zeros."""
    zeros = jax.tree.map(jnp.zeros_like, read()[1])
    return jax.jit(jax.grad(lambda add: metric(runner()(CLEAN, Tap(add=add))[0])))(zeros)


def test_the_gradient_at_a_site_is_its_finite_difference(slopes):
    zeros = jax.tree.map(jnp.zeros_like, read()[1])
    moved = jax.jit(lambda add: metric(runner()(CLEAN, Tap(add=add))[0]))
    rng = np.random.default_rng(2)
    for site in SITES:
        direction = rng.normal(size=zeros[site].shape).astype(np.float32)
        # with the gradient, so that nothing cancels; and a small step for each layer: the streams of the first and the
        # last differ tenfold in size
        direction = np.sign(slopes[site]) * np.abs(direction)
        direction *= 0.001 * np.std(read()[1][site], axis=tuple(range(1, direction.ndim)), keepdims=True)
        up, down = (moved({**zeros, site: sign * direction}) for sign in (1, -1))
        want = float((slopes[site] * direction).sum())
        close(float(up - down) / 2, want, 1e-3)
        assert np.abs(slopes[site]).max() > 1e-4, site


def test_a_sweep_by_vmap_is_the_loop():
    """One compile for every layer and head: the edit is data."""
    _, at = read()
    heads = at["block.attn.z"].shape[3]
    cells = [(layer, head) for layer in range(L) for head in range(heads)]
    masks = np.zeros((len(cells), *at["block.attn.z"].shape), bool)
    for index, (layer, head) in enumerate(cells):
        masks[index, layer, :, :, head] = True

    def effect(mask):
        return metric(runner()(CORRUPT, Tap(put={"block.attn.z": (mask, at["block.attn.z"])}))[0])

    swept = jax.jit(jax.vmap(effect))(masks)
    alone = jax.jit(effect)
    close(swept, np.array([alone(mask) for mask in masks]))
    assert np.std(swept) > 1e-4


def test_a_module_without_sites_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"a Dense names no activations"):
        capture.apply(nn.Dense(3), {}, jnp.ones(3), tap=Tap(("embed",)))


def test_a_name_that_no_site_has_is_refused_with_the_list():
    for tap in (Tap(("block.attn.pettern",)), Tap(add={"block.attn.pettern": jnp.zeros(1)})):
        with pytest.raises(
            ConfigError, match=r"unknown sites block.attn.pettern; this model has embed, block.resid_pre, .*final"
        ):
            capture.apply(decoder.Decoder(GPT), params(), CLEAN, tap=tap)


class Partly(nn.Module):
    """A model that lists a site which this configuration of it never visits."""

    sites = ("embed", "final")

    @nn.compact
    def __call__(self, x, tap=None):
        return visit(self, tap, "final", x * self.param("w", nn.initializers.ones, (3,)))


@pytest.mark.parametrize(
    "tap",
    [
        Tap(("final", "embed")),
        Tap(add={"embed": np.ones(3, np.float32)}),
        Tap(put={"embed": (np.array(True), np.ones(3, np.float32))}),
    ],
    ids=["read", "add", "put"],
)
def test_a_site_that_was_never_reached_is_no_silent_success(tap):
    with pytest.raises(ConfigError, match="the model did not reach the sites embed in this configuration"):
        capture.apply(Partly(), {"w": jnp.ones(3)}, jnp.ones(3), tap=tap)
