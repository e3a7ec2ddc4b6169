import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.layers.readout import Head, pool, states
from fm_jax.models.language import decoder, encoder
from tests.close import close

LENGTH = np.array([12, 5, 1], np.int32)
HIDDEN = np.random.default_rng(1).normal(size=(3, 12, 5)).astype(np.float32)


def test_pooling_is_the_mean_the_last_or_the_first_of_the_real_tokens():
    rows = list(zip(HIDDEN, LENGTH, strict=True))
    mean, last, first = (pool(jnp.asarray(HIDDEN), jnp.asarray(LENGTH), how) for how in ("mean", "last", "first"))
    close(mean, np.array([row[:length].mean(axis=0) for row, length in rows]))
    np.testing.assert_array_equal(last, [row[length - 1] for row, length in rows])
    np.testing.assert_array_equal(first, HIDDEN[:, 0])
    empty = pool(jnp.asarray(HIDDEN), jnp.array([0, 1, 2]), "mean")[0]
    assert empty.tolist() == [0.0] * 5  # a row that only fills


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_a_dense_layer(shape, bias):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    params = meta.unbox(Head(2, bias=bias).init(jax.random.key(0), x)["params"])
    assert params.keys() == ({"kernel", "bias"} if bias else {"kernel"})
    params = jax.tree.map(lambda leaf: leaf + 1.0, params)
    want = x @ params["kernel"] + (1.0 if bias else 0.0)
    close(Head(2, bias=bias).apply({"params": params}, x), want)


@pytest.mark.parametrize(("name", "act"), [("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0))])
def test_a_hidden_layer_stands_before_it(name, act):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    head = Head(2, hidden=name)
    params = meta.unbox(head.init(jax.random.key(0), x)["params"])
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == {
        "bias": (2,), "kernel": (5, 2), "hidden/bias": (5,), "hidden/kernel": (5, 5)
    }  # fmt: skip
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.3, params)
    inner = act(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    want = inner @ params["kernel"] + params["bias"]
    close(head.apply({"params": params}, x), want)


def test_dropout_falls_on_what_the_last_layer_reads():
    x = jnp.ones((400, 5))
    head = Head(1, bias=False, dropout=0.5)
    out = head.apply({"params": {"kernel": jnp.ones((5, 1))}}, x, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(out)) <= {0.0, 2.0, 4.0, 6.0, 8.0, 10.0}  # five inputs, each 0 or 1/(1 - 0.5)
    assert abs(float(out.mean()) - 5) < 0.5
    assert (head.apply({"params": {"kernel": jnp.ones((5, 1))}}, x) == 5).all()


class Reader(nn.Module):
    backbone: nn.Module

    @nn.compact
    def __call__(self, tokens, length, types=None):
        return states(self.backbone, tokens, length, types, None)


TOKENS = np.random.default_rng(0).integers(0, 96, (3, 12), dtype=np.int32)


@pytest.mark.parametrize("backbone", [encoder.Encoder(encoder.tiny()), decoder.Decoder(decoder.tiny())])
def test_padding_is_never_read(backbone):
    model = Reader(backbone)
    params = meta.unbox(model.init(jax.random.key(0), TOKENS, LENGTH)["params"])
    inside = np.arange(12) < LENGTH[:, None]
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, LENGTH))
    one, two = (np.asarray(apply(np.where(inside, TOKENS, garbage))) for garbage in (0, 95))
    np.testing.assert_array_equal(one[inside], two[inside])
    assert (one[~inside] != two[~inside]).any()


def test_a_causal_backbone_refuses_token_types():
    model = Reader(decoder.Decoder(decoder.tiny()))
    with pytest.raises(ConfigError, match="Decoder has no token types"):
        model.init(jax.random.key(0), TOKENS, LENGTH, TOKENS)
