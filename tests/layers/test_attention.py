import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.layers import attention
from fm_jax.layers.attention import Attention, AttentionConfig, Where
from fm_jax.layers.dense import normal
from tests.close import about, close

B, T, D = 2, 6, 12
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3 must be a multiple of num_kv_heads 2"),
        ({"num_heads": 0, "num_kv_heads": 1}, "num_heads must be at least 1, not 0"),
        ({"num_heads": 2, "num_kv_heads": 2, "windows": ()}, "must be one or more numbers"),
        ({"num_heads": 2, "num_kv_heads": 2, "windows": (4, -1)}, r"windows \(4, -1\)"),
    ],
)
def test_heads_and_windows_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(head_dim=4, **options)


def test_the_layer_is_projections_around_the_textbook_attention():
    cfg = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, scale=0.7)
    model = Attention(cfg, normal(0.5), normal(0.5))
    where = Where(jnp.arange(T)[None])
    params = meta.unbox(model.init(jax.random.key(0), X, where))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    def heads(name):
        flat = X @ params[name]["kernel"] + np.reshape(params[name]["bias"], (1, 1, -1))
        return np.repeat(flat.reshape(B, T, -1, 6), 4 // (flat.shape[-1] // 6), axis=2)

    query, key, value = map(heads, "qkv")
    scores = np.einsum("bthk,bshk->bhts", query, key) * 0.7
    scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    z = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), value).reshape(B, T, -1)
    want = z @ params["o"]["kernel"] + np.reshape(params["o"]["bias"], (1, 1, -1))
    close(model.apply({"params": params}, X, where), want)


def test_a_cached_query_is_not_windowed_by_its_row(monkeypatch):
    """A fused kernel counts a window in rows of its inputs; a cached query stands at another slot than its row."""
    cfg = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=6, windows=(3,))
    model = Attention(cfg, normal(0.5), normal(0.5))
    params = meta.unbox(model.init(jax.random.key(0), X, Where(jnp.arange(T)[None])))["params"]
    calls, real = [], attention.ops.attention
    monkeypatch.setattr(attention.ops, "attention", lambda *args, **how: calls.append(how) or real(*args, **how))
    model.apply({"params": params}, X, Where(jnp.arange(T)[None]))
    model.apply({"params": params}, X, Where(jnp.arange(T)[None]), mutable=["cache"])
    fused, cached = calls
    assert fused["window"] == 3 and fused["is_causal"] and fused.get("mask") is None
    assert cached["mask"] is not None and not cached.get("window") and not cached.get("is_causal")


def test_attention_that_is_not_causal_keeps_no_cache():
    cfg = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=6, causal=False)
    model = Attention(cfg, normal(0.5), normal(0.5))
    where = Where(jnp.arange(T)[None])
    params = meta.unbox(model.init(jax.random.key(0), X, where))["params"]
    out, kept = model.apply({"params": params}, X, where, mutable=["cache"])
    assert not kept
    close(out, model.apply({"params": params}, X, where))


@pytest.mark.parametrize("layer", ["self", "cross"])
def test_queries_may_start_otherwise_than_keys(layer):
    cfg = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=8)
    x = jnp.zeros((1, 2, 64))
    made = {"self": attention.Attention, "cross": attention.CrossAttention}[layer]
    inputs = (x, Where(jnp.arange(2)[None])) if layer == "self" else (x, x, jnp.array([2]))
    model = made(cfg, normal(0.5), normal(0.25), query_init=normal(0.1))
    params = meta.unbox(model.init(jax.random.key(0), *inputs))["params"]
    spread = {name: float(params[name]["kernel"].std()) for name in "qkvo"}
    for name, want in {"q": 0.1, "k": 0.5, "v": 0.5, "o": 0.25}.items():
        about(spread[name], want, 0.05)
