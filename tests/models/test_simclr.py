import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.checkpoint import surgery
from fm_jax.core import tree
from fm_jax.models.vision import resnet
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.simclr import SimCLR
from tests.close import close

BACKBONE = resnet.ResNet(resnet.tiny())
MODEL = SimCLR(BACKBONE, out=8)
IMAGE = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)


def fresh(model, seed):
    return jax.jit(lambda key: meta.unbox(model.init(key, IMAGE)["params"]))(jax.random.key(seed))


@pytest.fixture(scope="module")
def params():
    return fresh(MODEL, 0)


def test_the_head_is_two_layers_without_bias_each_normalised_over_the_batch(params):
    features = np.asarray(BACKBONE.apply({"params": params["backbone"]}, IMAGE, mutable=["statistics"])[0], np.float64)
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["project"])

    def normalised(x, name):
        scale, bias = head[name]["scale"], head[name]["bias"]
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias

    hidden = np.maximum(normalised(features @ head["hidden"]["kernel"], "norm_hidden"), 0)
    want = normalised(hidden @ head["out"]["kernel"], "norm_out")
    got, _ = MODEL.apply({"params": params}, IMAGE, mutable=["statistics"])
    assert got.shape == (6, 8) and head["hidden"]["kernel"].shape == (16, 16)
    close(got, want)
    assert set(head["hidden"]) == set(head["out"]) == {"kernel"}


def test_its_backbone_starts_a_classifier_whole(params):
    classifier = ImageClassifier(BACKBONE, 10)
    target = fresh(classifier, 1)
    loaded = surgery.load(target, params, fresh=("head/.*",), unused=("project/.*",))
    assert tree.flatten(params["backbone"]).keys() == tree.flatten(loaded["backbone"]).keys()
    for path, leaf in tree.flatten(params["backbone"]).items():
        np.testing.assert_array_equal(tree.flatten(loaded["backbone"])[path], leaf)
    np.testing.assert_array_equal(loaded["head"]["kernel"], target["head"]["kernel"])


def test_only_the_parameters_of_the_head_are_added(params):
    assert set(params) == {"backbone", "project"}
    assert set(tree.flatten(params["backbone"])) == set(tree.flatten(fresh(BACKBONE, 0)))
    assert MODEL.sites == BACKBONE.sites
