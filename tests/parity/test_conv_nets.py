"""ResNets and EfficientNets beyond `test_live.py`: ResNets in training, with the running statistics after a step; wrong
programs, which must be seen; and folders.

Theirs hands TensorFlow's momentum to torch, so an EfficientNet is compared in evaluation only.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers

from fm_jax.core import statistics, tree
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import pretrained
from fm_jax.layers import squeeze_excite
from fm_jax.models.vision import efficientnet, resnet
from tests.close import close, small
from tests.parity import convert
from tests.parity.all_families import FAMILY
from tests.parity.changes import change
from tests.parity.comparison import TOLERANCE, expected, shared
from tests.parity.distances import distances
from tests.parity.vision import efficientnet as efficientnets
from tests.parity.vision import resnet as resnets

ALL = {**resnets.CASES, **efficientnets.CASES}


def trained(name, change=lambda m, p: (m, p), *, moved=True):
    """Return the distances in training, with those of the next running statistics."""
    peer = FAMILY[name].peer(name, moved=moved)
    module, params, _ = expected(name, moved=moved)
    answer = FAMILY[name].theirs(name, peer, train=True)
    gradients, _ = statistics.split(convert.params(module, answer["gradients"]))
    after = tree.flatten(statistics.split(convert.params(module, answer["after"]))[1])
    module, params = change(module, params)
    mine = FAMILY[name].ours(module, FAMILY[name].batch(name), train=True)(params)
    return distances(mine, {**answer, "gradients": gradients, "statistics": after, "states": {}})


def compared(name):
    """Return the distances of a program that was changed."""
    module, params, peer = expected(name)
    return distances(FAMILY[name].ours(module, FAMILY[name].batch(name))(params), peer)


@pytest.mark.parametrize("name", resnets.CASES)
@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "moved"])
def test_our_resnet_trains_as_transformers_does(name, moved):
    found = trained(name, moved=moved)
    print(name, moved, {key: f"{value:.1e}" for key, value in found.items()})
    small(max(found.values()), TOLERANCE)


def _padded(real, padding):
    return lambda *args, **options: real(*args, **{**options, "padding": padding})


def test_uneven_padding_is_seen_in_a_resnet(monkeypatch):
    monkeypatch.setattr(resnet, "conv", _padded(resnet.conv, "SAME"))
    assert compared("resnet-basic")["logits"] > 1e-2


def test_even_padding_is_seen_in_an_efficientnet(monkeypatch):
    real = efficientnet.Depthwise
    monkeypatch.setattr(
        efficientnet, "Depthwise", lambda size, stride, padding, **more: real(size, stride, None, **more)
    )
    assert compared("efficientnet-even")["logits"] > 1e-2
    small(compared("efficientnet-odd")["logits"], TOLERANCE)  # odd sizes are padded evenly by TensorFlow too


def test_even_padding_is_seen_in_an_efficientnets_stem(monkeypatch):
    monkeypatch.setattr(efficientnet, "conv", _padded(efficientnet.conv, None))
    assert compared("efficientnet-even")["logits"] > 1e-2


def test_a_squeeze_as_wide_as_a_share_of_the_widened_channels_does_not_fit():
    model, _, _ = expected("efficientnet-even")
    peer = efficientnets.peer("efficientnet-even")
    wide = change(model, squeeze=model.backbone.cfg.squeeze * 4)
    with pytest.raises(CheckpointError, match="squeeze_excite"):
        convert.params(wide, efficientnets.tensors(peer))


def test_another_activation_in_the_squeeze_is_seen(monkeypatch):
    nn = SimpleNamespace(silu=jax.nn.relu, sigmoid=jax.nn.sigmoid)
    monkeypatch.setattr(squeeze_excite, "jax", SimpleNamespace(nn=nn, Array=jax.Array))
    assert compared("efficientnet-even")["logits"] > 3 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind"), [("resnet-basic", resnet.ResNet), ("efficientnet-even", efficientnet.EfficientNet)]
)
def test_a_mean_over_one_axis_only_is_seen(name, kind, monkeypatch):
    monkeypatch.setattr(kind, "features", lambda self, image, tap=None: self.hidden(image, tap=tap).mean(axis=1)[:, 0])
    found = compared(name)
    small(found["states"], TOLERANCE)
    assert found["logits"] > 3 * TOLERANCE, found


@pytest.mark.parametrize("padded", [((0, 1), (0, 1)), ((1, 1), (0, 1))], ids=["uneven", "uneven in width"])
def test_another_padding_of_the_pool_is_seen(monkeypatch, padded):
    """Padding with 0 instead of -inf cannot be: what is pooled is not negative."""

    def pool(x, size, *, stride, padding):
        return resnet.nn.max_pool(x, (size, size), (stride, stride), padded)

    monkeypatch.setattr(resnet, "max_pool", pool)
    module, params, peer = expected("resnet-basic")
    mine = resnets.ours(module, resnets.batch("resnet-basic"))(params)
    assert shared("resnet-basic", mine, peer)["logits"] > 3 * TOLERANCE


@pytest.mark.parametrize("name", ["resnet-basic", "efficientnet-even"])
def test_moments_of_the_batch_in_evaluation_are_seen(name):
    model, params, peer = expected(name)
    mine = FAMILY[name].ours(model, FAMILY[name].batch(name), train=True)(params)
    assert distances(mine, {"outputs": peer["outputs"], "loss": peer["loss"]})["logits"] > 0.1


def test_another_momentum_is_seen():
    found = trained("resnet-basic", lambda m, p: (change(m, norm_momentum=0.99), p))
    assert found["statistics"] > 3 * TOLERANCE
    small(found["logits"], TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_folders_go_both_ways(name, tmp_path):
    """What transformers saved opens here, and what is saved here opens there, with equal numbers."""
    peer = FAMILY[name].peer(name)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    model, params, _ = expected(name)
    assert found.module == model
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    pretrained.save(tmp_path / "ours", found.module, found.params, labels=found.labels)
    again, said = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    theirs, mine = FAMILY[name].tensors(peer), FAMILY[name].tensors(again)
    assert theirs.keys() == mine.keys()
    for key, want in theirs.items():
        np.testing.assert_array_equal(mine[key], want, err_msg=key)
    image = torch.from_numpy(FAMILY[name].batch(name)["image"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        close(again.eval()(image).logits.numpy(), peer(image).logits.numpy())


@pytest.mark.parametrize(("name", "kind"), [("resnet-v1", "ResNetModel"), ("efficientnet-odd", "EfficientNetModel")])
def test_a_bare_model_goes_both_ways(name, kind, tmp_path):
    model, params, _ = expected(name)
    pretrained.save(tmp_path / "bare", model.backbone, params["backbone"])
    again, said = getattr(transformers, kind).from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not said["unexpected_keys"]
    assert not said["missing_keys"]
    again.save_pretrained(tmp_path / "again")
    back = pretrained.load(tmp_path / "again")
    assert back.module == model.backbone
    jax.tree.map(np.testing.assert_array_equal, back.params, params["backbone"])
