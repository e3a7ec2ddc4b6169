import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.layers.conv import Depthwise, conv, fan_out
from tests.close import about, close

X = np.random.default_rng(0).normal(size=(2, 8, 10, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "shape"),
    [
        (3, 1, None, (8, 10)),
        (3, 2, None, (4, 5)),
        (7, 2, 3, (4, 5)),
        (3, 2, "SAME", (4, 5)),
        (3, 1, "VALID", (6, 8)),
        ((1, 3), 1, None, (8, 10)),
    ],
)
def test_the_padding_is_the_one_asked_for(size, stride, padding, shape):
    layer = conv(4, size, (None, "mlp"), stride=stride, padding=padding)
    out, _ = layer.init_with_output(jax.random.key(0), X)
    assert out.shape == (2, *shape, 4)


def test_stride_two_pads_as_torch_does_unless_told_otherwise():
    """SAME pads (0, 1) on even sizes, torch's padding=1 (1, 1): other outputs altogether."""
    params = conv(4, 3, (None, "mlp")).init(jax.random.key(0), X)
    torch, same = (conv(4, 3, (None, "mlp"), stride=2, padding=p).apply(params, X) for p in (None, "SAME"))
    padded = np.pad(X, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = np.einsum("bhwc,hwco->bo", padded[:, :3, :3], meta.unbox(params)["params"]["kernel"])
    close(torch[:, 0, 0], corner)
    assert np.abs(np.asarray(torch) - np.asarray(same)).max() > 0.1


def test_the_initial_variance_is_that_of_the_outgoing_fan():
    kernel = fan_out()(jax.random.key(0), (3, 3, 64, 128))
    about(np.asarray(kernel).std(), (2 / (9 * 128)) ** 0.5, 0.02)


def test_a_depthwise_layer_has_one_filter_a_channel():
    params = meta.unbox(Depthwise(5, stride=2).init(jax.random.key(0), X))["params"]
    assert params["kernel"].shape == (5, 5, 1, 3)
    assert Depthwise(5, stride=2).apply({"params": params}, X).shape == (2, 4, 5, 3)


def test_a_depthwise_filter_starts_as_if_it_were_alone():
    kernel = meta.unbox(Depthwise(3).init(jax.random.key(0), np.zeros((1, 4, 4, 2048), np.float32)))["params"]["kernel"]
    about(np.asarray(kernel).std(), (2 / 9) ** 0.5, 0.02)
