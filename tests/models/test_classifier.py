import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.classifier import Classifier

BACKBONE = decoder.Decoder(decoder.tiny())
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 12), dtype=np.int32)
LENGTH = np.array([12, 5, 1], np.int32)


@pytest.fixture(scope="module")
def params():
    model = Classifier(BACKBONE, 4)
    return jax.jit(lambda key: meta.unbox(model.init(key, TOKENS, LENGTH)["params"]))(jax.random.key(0))


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


def test_an_encoder_is_classified_by_its_first_token_and_sees_no_padding():
    model = Classifier(encoder.Encoder(encoder.tiny()), 4, pool="first", hidden="tanh")
    types = np.tile(np.arange(12) > 3, (3, 1)).astype(np.int32)
    params = jax.jit(lambda key: meta.unbox(model.init(key, TOKENS, LENGTH, types)["params"]))(jax.random.key(0))
    assert params["head"]["hidden"]["kernel"].shape == (32, 32)
    inside = np.arange(12) < LENGTH[:, None]
    apply = jax.jit(lambda tokens, types: model.apply({"params": params}, tokens, LENGTH, types))
    plain = apply(np.where(inside, TOKENS, 0), types)
    np.testing.assert_array_equal(plain, apply(np.where(inside, TOKENS, 95), types))
    assert (np.abs(plain - apply(TOKENS, 1 - types)).max(axis=1) > 0).all()
    changed = TOKENS.copy()
    changed[0, 11] += 1  # the last token moves what the first one says: attention sees both ways
    assert np.abs(apply(changed, types) - apply(TOKENS, types))[0].max() > 0
