"""Our ResNets and EfficientNets against live transformers: every stage's output, logits, loss, gradients; for ResNets
in training too, with the running statistics after a step. The mutants below must fail.

Theirs hands TensorFlow's momentum to torch, so an EfficientNet is compared in evaluation only.
"""

from dataclasses import replace
from functools import cache
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
from tests.parity import conv_peers, conv_task, convert

TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU


@cache
def expected(name, *, drawn=True, train=False):
    """Return our module and parameters, and the peer's numbers in our terms."""
    peer = conv_peers.build(name)
    if drawn:
        conv_peers.draw(peer, seed=0)
    model = convert.module(peer.config.to_dict())
    found = conv_peers.theirs(name, peer, train=train)
    found["gradients"] = statistics.split(convert.params(model, found["gradients"]))[0]
    if train:
        found["statistics"] = tree.flatten(statistics.split(convert.params(model, found["after"]))[1])
        del found["sites"]
    return model, convert.params(model, conv_peers.tensors(peer)), found


def compared(name, change=lambda m, p: (m, p), *, drawn=True, train=False):
    model, params, peer = expected(name, drawn=drawn, train=train)
    model, params = change(model, params)
    return conv_task.distances(conv_task.ours(model, conv_peers.rows(name), train=train)(params), peer)


@pytest.mark.parametrize("name", conv_peers.CASES)
def test_our_network_computes_what_transformers_does(name):
    found = compared(name)
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    small(max(found.values()), TOLERANCE)


@pytest.mark.parametrize("name", conv_peers.RESNETS)
@pytest.mark.parametrize("drawn", [False, True], ids=["fresh", "drawn"])
def test_our_resnet_trains_as_transformers_does(name, drawn):
    found = compared(name, drawn=drawn, train=True)
    print(name, drawn, {key: f"{value:.1e}" for key, value in found.items()})
    small(max(found.values()), TOLERANCE)


def _cfg(model, **changes):
    return model.clone(backbone=model.backbone.clone(cfg=replace(model.backbone.cfg, **changes)))


def _without(params, name):
    return tree.map_with_path(lambda path, leaf: np.zeros_like(leaf) if name in path else leaf, params)


def _turned(params):
    """Swap height and width of every kernel."""
    return tree.map_with_path(lambda path, leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)


MUTANTS = {
    "v1 instead of v1.5": ("resnet-bottleneck", lambda m, p: (_cfg(m, stride_first=True), p)),
    "v1.5 instead of v1": ("resnet-v1", lambda m, p: (_cfg(m, stride_first=False), p)),
    "resnet with another epsilon": ("resnet-basic", lambda m, p: (_cfg(m, norm_epsilon=1e-3), p)),
    "efficientnet with another epsilon": ("efficientnet-even", lambda m, p: (_cfg(m, norm_epsilon=1e-5), p)),
    "no shortcuts": ("resnet-basic", lambda m, p: (_cfg(m, shortcut="none"), p)),
    "shortcuts without parameters": ("resnet-basic", lambda m, p: (_cfg(m, shortcut="pad"), p)),
    "height and width of a resnet's kernels": ("resnet-basic-odd", lambda m, p: (m, _turned(p))),
    "height and width of an efficientnet's kernels": ("efficientnet-odd", lambda m, p: (m, _turned(p))),
    "running means lost": ("resnet-v1", lambda m, p: (m, _without(p, "/mean"))),
    "a squeeze's bias lost": ("efficientnet-odd", lambda m, p: (m, _without(p, "squeeze/expand/bias"))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_variant_is_seen(mutant):
    found = compared(*MUTANTS[mutant])
    print(mutant, {key: f"{value:.1e}" for key, value in found.items()})
    assert min(found["logits"], found["sites"]) > 3 * TOLERANCE and found["gradients"] > TOLERANCE, found


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
    peer = conv_peers.build("efficientnet-even")
    wide = _cfg(model, squeeze=model.backbone.cfg.squeeze * 4)
    with pytest.raises(CheckpointError, match="squeeze_excite"):
        convert.params(wide, conv_peers.tensors(peer))


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
    small(found["sites"], TOLERANCE)
    assert found["logits"] > 3 * TOLERANCE, found


@pytest.mark.parametrize("change", [((0, 1), (0, 1)), ((1, 1), (0, 1))], ids=["uneven", "uneven in width"])
def test_another_padding_of_the_pool_is_seen(monkeypatch, change):
    """Padding with 0 instead of -inf cannot be: what is pooled is not negative."""
    real = resnet.nn.max_pool
    monkeypatch.setattr(resnet.nn, "max_pool", lambda x, size, strides, padding: real(x, size, strides, change))
    model, params, peer = expected("resnet-basic")
    got = conv_task.ours(model, conv_peers.rows("resnet-basic"))(params)
    assert np.abs(got["logits"] - peer["logits"]).max() > 3 * TOLERANCE * peer["logits"].std()


@pytest.mark.parametrize("name", ["resnet-basic", "efficientnet-even"])
def test_moments_of_the_batch_in_evaluation_are_seen(name):
    model, params, peer = expected(name)
    wrong = conv_task.ours(model, conv_peers.rows(name), train=True)(params)["logits"]
    assert np.abs(wrong - peer["logits"]).max() > 0.1 * peer["logits"].std()


def test_another_momentum_is_seen():
    found = compared("resnet-basic", lambda m, p: (_cfg(m, norm_momentum=0.99), p), train=True)
    assert found["statistics"] > 3 * TOLERANCE
    small(found["logits"], TOLERANCE)


@pytest.mark.parametrize("name", conv_peers.CASES)
def test_folders_go_both_ways(name, tmp_path):
    """What transformers saved opens here, and what is saved here opens there, with equal numbers."""
    peer = conv_peers.build(name)
    conv_peers.draw(peer, seed=0)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    model, params, _ = expected(name)
    assert found.module == model
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    pretrained.save(tmp_path / "ours", found.module, found.params, labels=found.labels)
    again, said = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    theirs, mine = conv_peers.tensors(peer), conv_peers.tensors(again)
    assert theirs.keys() == mine.keys()
    for key, want in theirs.items():
        np.testing.assert_array_equal(mine[key], want, err_msg=key)
    image = torch.from_numpy(conv_peers.rows(name)["image"].transpose(0, 3, 1, 2).copy())
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
