import random
import struct
import tracemalloc

import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import darknet, stored
from tests.hub.darknet_files import NETWORKS, header, sections, tensors, text, weights, write

LISTED = sections(NETWORKS["yolov3-tiny"])
ARRAYS = tensors(LISTED)


def parsed(listed=LISTED):
    return darknet.sections(text(listed), "net.cfg")


def convolutions(listed=LISTED):
    return darknet.convolutions(*darknet.layers(parsed(listed), "net.cfg"), "net.cfg")


def opened(tmp_path, data, listed=LISTED, **more):
    (tmp_path / "net.weights").write_bytes(data)
    return darknet.open_weights(tmp_path / "net.weights", convolutions(listed), **more)


def whole(array):
    return tuple(slice(0, size) for size in array.shape)


# -- .cfg --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_sections_come_back_in_order_and_again_from_what_is_written(name):
    found = parsed(sections(NETWORKS[name]))
    want = [(kind, {option: "".join(value.split()) for option, value in options.items()}) for kind, options in
            sections(NETWORKS[name])]  # fmt: skip
    assert [(kind, dict(options)) for kind, options in found] == want
    assert darknet.sections(darknet.cfg_text(found), "net.cfg") == found


def test_older_names_of_sections_and_windows_lines_are_read():
    listed = darknet.sections("[network]\r\nwidth = 8\r\n[conv]\r\nfilters=2\r\n[max]\r\n", "net.cfg")
    assert [kind for kind, _ in listed] == ["net", "convolutional", "maxpool"]


def test_layers_have_every_option_and_absolute_numbers():
    net, layers = darknet.layers(parsed(), "net.cfg")
    assert net.options == {"width": 24, "height": 16, "channels": 3}
    conv = {
        "filters": 4,
        "size": 3,
        "stride": 1,
        "padding": 1,
        "groups": 1,
        "batch_normalize": 1,
        "activation": "leaky",
    }
    assert layers[0] == ("convolutional", conv)
    assert layers[1] == ("maxpool", {"stride": 2, "size": 2, "padding": 1})
    assert [layer.options["layers"] for layer in layers if layer.kind == "route"] == [(7,), (13, 2)]
    assert layers[10].options["anchors"] == (2, 3, 4, 3, 6, 5, 8, 12) and layers[10].options["mask"] == (2, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_follow_from_the_layers_before(name):
    listed = sections(NETWORKS[name])
    found = dict(pair for layer in convolutions(listed) for pair in layer.tensors())
    assert found == {key: array.shape for key, array in tensors(listed).items()}
    assert len(convolutions(listed)) == sum("." in word or "=" in word for word in NETWORKS[name].split())


# (lines of a .cfg, what the message must name)
NET = "[net]\nwidth=8\nheight=8\n"
MALFORMED = [
    ("", "does not begin with [net]"),
    ("[convolutional]\nfilters=2\n", "does not begin with [net]"),
    ("width=8\n", "line 1: 'width=8' is neither [section] nor option=value in one"),
    (NET + "filters\n", "line 4: 'filters'"),
    (NET + "width=9\n", "line 4: 'width' is in [net] twice"),
    (NET + "[region]\n", "layer 0 [region] is not supported; supported are [net], [convolutional]"),
    (NET + "[net]\nwidth=8\nheight=8\n", "layer 0 [net] is not supported"),
    ("[net]\nwidth=8\n", "[net] has no height"),
    ("[net]\nwidth=8\nheight=x\n", "[net] has height 'x', which is not a number"),
    (NET + "[conv]\nfilters=-2\n", "layer 0 [convolutional] has filters '-2', which is out of range"),
    (NET + "[conv]\nfilters=99999999\n", "filters '99999999', which is out of range"),
    (NET + "[conv]\nfilters=" + "9" * 5000, "which is not a number"),
    (NET + "[conv]\nfilters=0\n", "layer 0 [convolutional] makes 0 channels of 3"),
    (NET + "[conv]\nfilters=2\nstride=0\n", "layer 0 [convolutional]"),
    (NET + "[conv]\nfilters=2\ngroups=2\n", "layer 0 [convolutional] makes 2 channels of 3 in 2 groups"),
    (NET + "[conv]\nbatch_normalize=2\n", "batch_normalize '2', which is out of range"),
    (NET + "[conv]\n[route]\nlayers=-2\n", "layer 1 [route] has layers '-2', which is not a layer before it"),
    (NET + "[conv]\n[route]\nlayers=1\n", "layer 1 [route]"),
    (NET + "[conv]\n[route]\n", "layer 1 [route] has no layers"),
    (NET + "[conv]\n[route]\nlayers=0\ngroups=0\n", "layer 1 [route] takes 1 channels in 0 groups"),
    (NET + "[conv]\n[shortcut]\nfrom=-1,-1\n", "layer 1 [shortcut] adds 2 layers"),
    (NET + "[yolo]\nmask=2\nanchors=1,2\nnum=1\n", "layer 0 [yolo]: mask, num and anchors do not fit"),
    (NET + "[yolo]\nmask=0\nanchors=1,x\nnum=1\n", "anchors '1,x', which is not a list of numbers"),
    (NET + "[conv]\n" * 1001, "more than 1000 sections"),
    (NET + "[conv]\nfilters=65536\n" + "[route]\nlayers=-1,-1\n" * 40, "joins 131,072 channels"),
]


@pytest.mark.parametrize(("lines", "word"), MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_malformed_is_refused_by_name(lines, word):
    with pytest.raises(CheckpointError) as caught:
        darknet.convolutions(*darknet.layers(darknet.sections(lines, "net.cfg"), "net.cfg"), "net.cfg")
    assert word in str(caught.value) and str(caught.value).startswith("net.cfg") and len(str(caught.value)) < 400


def test_damaged_text_gives_only_errors_of_ours():
    rng, seen = random.Random(0), 0
    parts = ["-1", "0", "x", "", "1e9", "99999999999", "1,2", "[", "]", "=", "\x00", "\x1b[2J", "é", "\n", "[yolo]\n"]
    for _ in range(300):
        lines = text(LISTED)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(lines))
            lines = lines[:at] + rng.choice(parts) + lines[at + rng.choice((0, 1, 5)) :]
        try:
            darknet.convolutions(*darknet.layers(darknet.sections(lines, "net.cfg"), "net.cfg"), "net.cfg")
        except CheckpointError as error:
            seen += 1
            assert str(error).isprintable() and len(str(error)) < 1000
    assert seen > 100


def test_a_text_that_is_none_is_refused(tmp_path):
    for name, data, word in (("a.cfg", b"\xff\xfe", "not UTF-8"), ("b.cfg", b"#" * 1_000_001, "1,000,001 bytes")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=word):
            darknet.read_text(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"there is no .*c\.cfg"):
        darknet.read_text(tmp_path / "c.cfg")


# -- .weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "length"), [((0, 1, 0), 16), ((0, 2, 0), 20), ((0, 2, 5), 20), ((1, 0, 0), 20)])
def test_the_version_says_how_long_the_header_is(tmp_path, version, length):
    start = header(*version, seen=4_000_000_000)
    assert len(start) == length
    found, file = opened(tmp_path, weights(ARRAYS, start))
    assert found == (*version, 4_000_000_000)
    for name, array in ARRAYS.items():
        assert file.read(name, whole(array)).tobytes() == array.tobytes()
    path = tmp_path / "again.weights"
    darknet.write_weights(path, convolutions(), ARRAYS.items(), found)
    assert path.read_bytes() == weights(ARRAYS, start)


def test_the_order_is_that_of_the_format(tmp_path):
    """Numbered through, so that a misplaced tensor shows."""
    count = sum(array.size for array in ARRAYS.values())
    _, file = opened(tmp_path, header() + np.arange(count, dtype="<f4").tobytes())
    firsts = {name: file.read(name, whole(ARRAYS[name])).flat[0] for name in ("0.biases", "0.scales", "0.rolling_mean")}
    assert list(firsts.values()) == [0, 4, 8]
    assert (
        file.read("0.rolling_variance", (slice(0, 1),)) == 12
        and file.read("0.weights", whole(ARRAYS["0.weights"]))[0, 1, 0, 2] == 16 + 9 + 2
    )
    assert file.read("2.biases", (slice(0, 1),)) == 16 + 4 * 27


FULL = weights(ARRAYS)
CUT = [
    (FULL[:-4], "ends in the weights of layer 16 [convolutional]"),
    (FULL[: 20 + 4 * 9], "ends in the rolling_mean of layer 0 [convolutional]"),
    (FULL[: 20 + 4 * (16 + 108)], "ends before layer 2 [convolutional]"),
    (FULL[:20], "ends before layer 0 [convolutional]"),
    (FULL + b"\0", "has 1 bytes after layer 16 [convolutional]"),
    (FULL + b"\0" * 400, "has 400 bytes after layer 16 [convolutional], the cfg's last layer with weights"),
    (FULL[:19], "cut short (19 bytes)"),
    (b"\0" * 15, "cut short (15 bytes)"),
    (struct.pack("<iiiQ", 0, 2000, 0, 0) + FULL[20:], "unsupported version 0.2000"),
    (struct.pack("<iiiQ", -1, 2, 0, 0) + FULL[20:], "unsupported version -1.2"),
]


@pytest.mark.parametrize(("data", "word"), CUT, ids=range(len(CUT)))
def test_missing_and_trailing_bytes_are_refused_with_the_layer_named(tmp_path, data, word):
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, data)
    assert word in str(caught.value) and "net.weights" in str(caught.value)


def test_no_memory_is_taken_for_what_the_file_has_not_got(tmp_path):
    huge = "[net]\nwidth=8\nheight=8\n" + "[conv]\nfilters=65000\nsize=60000\nbatch_normalize=1\n" * 3
    layers = darknet.convolutions(*darknet.layers(darknet.sections(huge, "net.cfg"), "net.cfg"), "net.cfg")
    (tmp_path / "net.weights").write_bytes(FULL)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"layer 0 \[convolutional\]"):
        darknet.open_weights(tmp_path / "net.weights", layers)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_infinities_are_refused_where_they_are_read(tmp_path):
    broken = {name: array.copy() for name, array in ARRAYS.items()}
    broken["2.rolling_variance"][3] = np.inf
    _, file = opened(tmp_path, weights(broken))
    file.read("2.rolling_mean", (slice(0, 8),))
    with pytest.raises(CheckpointError, match=r"2\.rolling_variance holds an infinity"):
        file.read("2.rolling_variance", (slice(0, 8),))
    opened(tmp_path, weights(broken), allow_nonfinite=True)[1].read("2.rolling_variance", (slice(0, 8),))


def test_what_does_not_fit_the_layers_is_not_written(tmp_path):
    for number, wrong in enumerate(([*ARRAYS.items()][1:], [("0.biases", np.zeros(5, np.float32))])):
        with pytest.raises(ValueError, match=r"0\.biases"):
            darknet.write_weights(tmp_path / str(number), convolutions(), wrong, darknet.Header())
    with pytest.raises(ValueError, match="shorter"):
        darknet.write_weights(tmp_path / "short", convolutions(), [*ARRAYS.items()][:-1], darknet.Header())


# -- where the files are -----------------------------------------------------------------------------------------------


def test_a_folder_and_either_file_lead_to_the_model(tmp_path):
    folder = write(tmp_path / "model", LISTED)
    (folder / "coco.names").write_text("a\n")
    want = (folder / "net.cfg", folder / "net.weights", folder / "coco.names")
    assert all(stored.darknet_files(source) == want for source in (folder, *want[:2]))
    assert stored.open_weights(folder).specs.keys() == ARRAYS.keys()
    (folder / "net.names").write_text("a\n")
    assert stored.darknet_files(folder).names == folder / "net.names"
    (folder / "config.json").write_text("{}")
    assert stored.darknet_files(folder) is None


def test_what_is_missing_or_there_twice_is_named(tmp_path):
    folder = write(tmp_path / "model", LISTED)
    write(folder, LISTED, stem="other")
    with pytest.raises(CheckpointError, match=r"holds net\.weights, other\.weights; give the path of one"):
        stored.darknet_files(folder)
    assert stored.darknet_files(folder / "net.weights").cfg == folder / "net.cfg"
    (folder / "other.weights").unlink()
    (folder / "net.cfg").unlink()
    with pytest.raises(
        CheckpointError, match=r"there is no .*net\.cfg; a Darknet model is NAME\.cfg and NAME\.weights"
    ):
        stored.darknet_files(folder)
    with pytest.raises(CheckpointError, match=r"there is no .*other\.weights"):
        stored.darknet_files(folder / "other.cfg")
    assert stored.darknet_files(tmp_path / "nothing.weights") is None


def test_a_pickle_is_not_opened(tmp_path):
    folder = write(tmp_path / "model", LISTED)
    (folder / "net.weights").write_bytes(b"PK\x03\x04" + FULL)
    with pytest.raises(CheckpointError, match="is a pickle despite its name"):
        stored.open_weights(folder)
