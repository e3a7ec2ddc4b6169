import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.models.language import decoder
from fm_jax.models.language.classifier import Classifier, pool

BACKBONE = decoder.Decoder(decoder.tiny())
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 12), dtype=np.int32)
LENGTH = np.array([12, 5, 1], np.int32)


@pytest.fixture(scope="module")
def params():
    model = Classifier(BACKBONE, 4)
    return jax.jit(lambda key: meta.unbox(model.init(key, TOKENS, LENGTH)["params"]))(jax.random.key(0))


def test_pooling_is_the_mean_or_the_last_of_the_real_tokens():
    hidden = np.random.default_rng(1).normal(size=(3, 12, 5)).astype(np.float32)
    rows = list(zip(hidden, LENGTH, strict=True))
    mean, last = (pool(jnp.asarray(hidden), jnp.asarray(LENGTH), how) for how in ("mean", "last"))
    np.testing.assert_allclose(mean, [row[:length].mean(axis=0) for row, length in rows], atol=1e-6)
    np.testing.assert_array_equal(last, [row[length - 1] for row, length in rows])
    assert pool(jnp.asarray(hidden), jnp.array([0, 1, 2]), "mean")[0].tolist() == [0.0] * 5  # a row that only fills


@pytest.mark.parametrize("how", ["mean", "last"])
def test_padding_changes_nothing(params, how):
    model = Classifier(BACKBONE, 4, pool=how)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, LENGTH))
    inside = np.arange(12) < LENGTH[:, None]
    np.testing.assert_array_equal(apply(np.where(inside, TOKENS, 0)), apply(np.where(inside, TOKENS, 95)))
    changed = TOKENS.copy()
    changed[np.arange(3), LENGTH - 1] += 1
    assert (np.abs(apply(changed) - apply(TOKENS)).max(axis=1) > 0).all()


def test_the_backbone_keeps_its_own_parameters(params):
    """A pretrained decoder's tree goes in as it is (its head, if it had one, stays behind)."""
    alone = jax.eval_shape(BACKBONE.init, jax.random.key(0), TOKENS)["params"]
    assert tree.flatten(params["backbone"]).keys() == tree.flatten(meta.unbox(alone)).keys()
    assert params["head"]["kernel"].shape == (32, 4)
