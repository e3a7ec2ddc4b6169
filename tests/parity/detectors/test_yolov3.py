"""YOLOv3 beside libreyolo's Darknet builder: published files and narrow ones, and wrong programs that must be seen.

The numbers go through a .cfg and a .weights, the latter written here by the format alone.
"""

from functools import lru_cache

import numpy as np
import pytest

from fm_jax.core import statistics
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import darknet
from fm_jax.hub.vision import yolov3 as names
from fm_jax.layers.batch_norm import BatchNorm
from fm_jax.models.vision import yolov3
from tests.close import small
from tests.parity import convert
from tests.parity.changes import change, edit, swap
from tests.parity.detectors import darknets
from tests.parity.detectors.libreyolo_peer import imported

TOLERANCE = 1e-4  # of the peer's standard deviation, or of a gradient's norm; float32 on CPU


@lru_cache
def expected(case):
    """Return (bytes of the .weights, the peer's answer)."""
    net = darknets.peer(case)
    return darknets.weights_file(net), darknets.theirs(case, net)


def loaded(case, folder):
    """Return what the hub makes of a case's files."""
    (folder / "net.cfg").write_text(darknets.cfg_text(case))
    (folder / "net.weights").write_bytes(expected(case)[0])
    return pretrained.load(folder)


def compared(case, folder, wrong=lambda model, params: (model, params)):
    """Return how far a changed program is from the peer."""
    found = loaded(case, folder)
    model, params = wrong(found.module, found.params)
    peer = expected(case)[1]
    gradients = statistics.split(convert.params(found.module, peer["gradients"]))[0]
    return darknets.distances(darknets.ours(model, darknets.images(case))(params), {**peer, "gradients": gradients})


@pytest.mark.parametrize("case", darknets.CASES)
def test_ours_computes_what_theirs_does(case, tmp_path):
    found = compared(case, tmp_path)
    print(case, {key: f"{value:.1e}" for key, value in found.items()})
    small(max(found.values()), TOLERANCE)


RAW, DECODED = ("boxes", "objectness", "classes", "gradients"), ("decoded",)
MUTANTS = {  # name -> (case, (our module, parameters) -> the same, one of them wrong; what must differ)
    "another epsilon": ("narrow", lambda m, p: (change(m, norm_epsilon=1e-5), p), RAW),
    "anchors turned": ("narrow", lambda m, p: (change(m, anchors=_turned(m.cfg.anchors)), p), DECODED),
    "anchors of other scales": ("narrow", lambda m, p: (change(m, anchors=m.cfg.anchors[::-1]), p), DECODED),
    "height and width of kernels": ("narrow", lambda m, p: (m, edit(p, "conv/kernel", _swapped)), RAW),
    "running means lost": ("narrow-tiny", lambda m, p: (m, edit(p, "/mean", np.zeros_like)), RAW),
    "scales first in the file": ("narrow-tiny", lambda m, p: (m, swap(p, "norm/scale", "norm/bias")), RAW),
    "maps joined in another order": ("narrow", lambda m, p: (m, edit(p, "neck2/conv1/conv/kernel", _rolled)), RAW[1:2]),
    "pools in another order": ("narrow-spp", lambda m, p: (change(m, pools=m.cfg.pools[::-1]), p), RAW[:3]),
    "no pools but one": ("narrow-spp", lambda m, p: (change(m, pools=(5, 5, 5)), p), RAW[:3]),
}


def _turned(anchors):
    return tuple(tuple((height, width) for width, height in pairs) for pairs in anchors)


def _swapped(kernel):
    return kernel.swapaxes(0, 1)


def _rolled(kernel):
    return np.roll(kernel, kernel.shape[2] // 3, axis=2)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_variant_is_seen(name, tmp_path):
    case, wrong, seen = MUTANTS[name]
    found = compared(case, tmp_path, wrong)
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    assert all(found[what] > 3 * TOLERANCE for what in seen), found
    if seen == DECODED:
        small(max(found[what] for what in RAW), TOLERANCE)


def test_an_epsilon_in_the_variance_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(yolov3, "BatchNorm", lambda *args, added_to, **more: BatchNorm(*args, **more))
    assert compared("narrow", tmp_path)["objectness"] > 30 * TOLERANCE


def test_another_slope_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(yolov3, "SLOPE", 0.11)
    assert compared("narrow-tiny", tmp_path)["objectness"] > 3 * TOLERANCE


def test_a_smooth_upsampling_is_seen(monkeypatch, tmp_path):
    def smooth(x):
        batch, height, width, channels = x.shape
        return yolov3.jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "bilinear")

    monkeypatch.setattr(yolov3, "_doubled", smooth)
    assert compared("narrow", tmp_path)["objectness"] > 3 * TOLERANCE


def test_padding_at_the_other_side_of_the_last_pool_is_seen(monkeypatch, tmp_path):
    real = yolov3.nn.max_pool
    monkeypatch.setattr(
        yolov3.nn, "max_pool", lambda x, size, strides, pads: real(x, size, strides, [pad[::-1] for pad in pads])
    )
    assert compared("narrow-tiny", tmp_path)["objectness"] > 3 * TOLERANCE


@pytest.mark.parametrize("case", darknets.NARROW)
def test_theirs_reads_the_files_that_ours_writes(case, tmp_path):
    found = loaded(case, tmp_path)
    pretrained.save(tmp_path / "ours", found.module, found.params, header=found.header)
    written = (tmp_path / "ours" / "yolov3.weights").read_bytes()
    assert written == expected(case)[0]
    reader = imported("models.darknet.cfg").parse_cfg_file(tmp_path / "ours" / "yolov3.cfg")
    net = imported("models.darknet.net").DarknetNet(*reader)
    imported("models.darknet.reader").load_darknet_weights(net, written)
    theirs = darknets.theirs(case, net.eval())["outputs"]
    assert all(np.array_equal(theirs[name], want) for name, want in expected(case)[1]["outputs"].items())


def test_every_other_published_file_is_refused_with_the_layer_named():
    said = {
        "yolov1": r"layer 28 \[local\]", "yolov1-tiny": r"layer 14 \[connected\]", "yolov2": r"layer 27 \[reorg\]",
        "yolov2-tiny": r"layer 15 \[region\]", "yolov4": r"layer 0 \[convolutional\] has activation 'mish'",
        "yolov4-tiny": r"layer 1 \[convolutional\]",
    }  # fmt: skip
    for name, word in said.items():
        text = imported("models.darknet.cfg").bundled_cfg_path(name).read_text()
        with pytest.raises(CheckpointError, match=word):
            names.module(Fields(_fields(text, name), f"{name}.cfg"))


@pytest.mark.parametrize(
    ("name", "preset", "count"),
    [
        ("yolov3", yolov3.yolov3, 61_949_149),
        ("yolov3-tiny", yolov3.yolov3_tiny, 8_852_366),
        ("yolov3-spp", yolov3.yolov3_spp, 62_998_749),
    ],
)
def test_the_presets_are_the_published_files(name, preset, count):
    text = imported("models.darknet.cfg").bundled_cfg_path(name).read_text()
    module = names.module(Fields(_fields(text, name), f"{name}.cfg"))
    assert module.cfg == preset()
    net = imported("models.darknet.net").DarknetNet(*imported("models.darknet.cfg").parse_cfg_text(text))
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    theirs = {key: tensor.shape for key, tensor in darknets.tensors(net).items()}
    ours = table.specs(names.table(module), families.abstract(module))
    assert {key: spec.shape for key, spec in ours.items()} == theirs


def _fields(text, name):
    return {"sections": [[kind, dict(options)] for kind, options in darknet.sections(text, name)]}
