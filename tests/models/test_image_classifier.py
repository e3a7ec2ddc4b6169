import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.models.vision import resnet
from fm_jax.models.vision.classifier import ImageClassifier
from tests.close import close

BACKBONE = resnet.ResNet(resnet.tiny())
X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def init(model):
    return meta.unbox(jax.jit(model.init)(jax.random.key(0), X)["params"])


def test_the_backbone_keeps_its_own_parameters_and_the_head_reads_its_features():
    params = init(ImageClassifier(BACKBONE, 5))
    assert tree.flatten(params["backbone"]).keys() == tree.flatten(init(BACKBONE)).keys()
    features = np.asarray(BACKBONE.apply({"params": params["backbone"]}, X))
    want = features @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    close(ImageClassifier(BACKBONE, 5).apply({"params": params}, X), want)


def test_a_head_may_have_no_bias():
    assert init(ImageClassifier(BACKBONE, 5, bias=False))["head"].keys() == {"kernel"}


def test_features_are_dropped_in_training_only():
    model = ImageClassifier(BACKBONE, 5, dropout=0.5)
    params = init(model)
    plain = model.apply({"params": params}, X)
    close(ImageClassifier(BACKBONE, 5).apply({"params": params}, X), plain)
    noisy = model.apply({"params": params}, X, rngs={"dropout": jax.random.key(0)})
    assert np.abs(noisy - plain).max() > 1e-3


@pytest.mark.parametrize("site", ["embed", "conv.stage1", "final"])
def test_sites_are_the_backbones(site):
    assert site in ImageClassifier(BACKBONE, 5).sites
