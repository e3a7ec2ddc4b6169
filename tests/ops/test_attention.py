from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.ops import attention as ops
from tests.close import close

B, T, S, H, G, K = 2, 6, 6, 4, 2, 8


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def oracle(query, key, value, mask, scale=K**-0.5):
    key, value = (np.repeat(x, H // G, axis=2) for x in (key, value))
    scores = np.einsum("bthk,bshk->bhts", query, key) * scale
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), value)


def lower(window=0):
    rows, columns = np.mgrid[:T, :S]
    return ((columns <= rows) & (rows - columns < (window or S)))[None]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_causal_attention_with_grouped_heads_is_the_textbook_one(window):
    got = ops.attention(*inputs(), scale=K**-0.5, is_causal=True, window=window)
    close(got, oracle(*inputs(), lower(window)))


def test_a_mask_says_the_same_as_the_flags():
    want = ops.attention(*inputs(), scale=0.3, is_causal=True, window=3)
    close(ops.attention(*inputs(), scale=0.3, mask=jnp.asarray(lower(3))), want)


def test_a_mask_of_its_own_for_each_row():
    mask = np.stack([np.tril(np.ones((T, S), bool)), np.ones((T, S), bool)])
    got = ops.attention(*inputs(), scale=K**-0.5, mask=jnp.asarray(mask))
    close(got, oracle(*inputs(), mask))


def test_a_query_that_may_see_nothing_gives_numbers_and_no_gradient_of_nan():
    query, key, value = inputs()
    mask = jnp.asarray(lower()).at[:, 2].set(False)

    def total(query):
        return ops.attention(query, key, value, scale=1.0, mask=mask).sum()

    assert np.isfinite(total(query))
    assert np.isfinite(jax.grad(total)(query)).all()


def test_half_precision_keeps_scores_and_weights_in_float32():
    query, key, value = inputs(jnp.bfloat16)
    scores = ops.scores(query, key, 1.0)
    assert scores.dtype == ops.pattern(scores, None).dtype == jnp.float32
    out = ops.attention(query, key, value, scale=K**-0.5, is_causal=True)
    assert out.dtype == jnp.bfloat16
    exact = oracle(*(np.asarray(x, np.float32) for x in (query, key, value)), lower())
    close(out.astype(np.float32), exact, 0.05)


CUDNN = [
    ("half", {}, True),
    ("float32", {"dtype": jnp.float32}, False),
    ("heads not in eights", {"width": 20}, False),
    ("heads too wide", {"width": 256}, False),
    ("mask of even lengths", {"mask": True}, True),
    ("odd lengths", {"time": S - 1, "length": S - 1}, False),
    ("one query against a cache", {"mask": True, "time": 1}, False),
]


@pytest.mark.parametrize(("name", "form", "fused"), CUDNN, ids=[case[0] for case in CUDNN])
def test_on_a_gpu_the_fused_kernel_gets_what_it_takes(monkeypatch, name, form, fused):
    """No GPU here: the dispatch is watched, and what the kernel would get is computed by XLA's own function."""
    calls = []
    real = jax.nn.dot_product_attention

    def kernel(*args, **options):
        calls.append(options.pop("implementation"))
        return real(*args, **options)

    monkeypatch.setattr(ops.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ops.jax.nn, "dot_product_attention", kernel)
    form = SimpleNamespace(**{"dtype": jnp.bfloat16, "width": 8, "time": S, "length": S, "mask": False, **form})
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(B, form.time, H, form.width)), form.dtype)
    key, value = (jnp.asarray(rng.normal(size=(B, form.length, G, form.width)), form.dtype) for _ in range(2))
    seen = lower(3)[:, S - form.time :] if form.mask else lower(3)[:, : form.time, : form.length]
    mask = jnp.asarray(seen) if form.mask else None
    how = {"mask": mask} if form.mask else {"is_causal": True, "window": 3}
    got = ops.attention(query, key, value, scale=form.width**-0.5, **how)
    assert calls == (["cudnn"] if fused else [])
    exact = (np.asarray(x, np.float32) for x in (query, key, value))
    want = oracle(*exact, seen, form.width**-0.5)
    close(got.astype(np.float32), want, 0.05 if form.dtype == jnp.bfloat16 else 1e-5)


def test_the_gradient_keeps_the_pattern_once():
    query, key, value = (jnp.stack([x, x]) for x in inputs())

    def layers(query, key, value):
        return jax.lax.scan(
            lambda sum, qkv: (sum + ops.attention(*qkv, scale=1.0).sum(), None), 0.0, (query, key, value)
        )

    _, gradient = jax.eval_shape(lambda *heads: jax.vjp(layers, *heads), query, key, value)
    kept = [leaf.shape for leaf in jax.tree.leaves(gradient) if leaf.size == 2 * B * H * T * S]
    assert kept == [(2, B, H, T, S)]
