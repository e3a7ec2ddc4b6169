"""YOLOv3 from Darknet's files and back; the general promises stand in test_families.py."""

import copy
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.hub import hub_convert
from fm_jax.core import statistics, tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.hub import pretrained, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import darknet
from fm_jax.hub.vision import yolov3 as names
from fm_jax.models.vision import yolov3
from fm_jax.models.vision.yolov3 import YOLOv3
from tests.hub.darknet_files import NETWORKS, header, sections, tensors, weights, write
from tests.hub.forms import assert_equal

CONFIGS = {
    "yolov3": replace(yolov3.tiny(), image_size=(16, 24)),
    "yolov3-tiny": yolov3.Config((4, 8, 16, 24), (), (16, 8), yolov3.tiny().anchors, 4, image_size=(16, 24)),
    "yolov3-spp": replace(yolov3.tiny(), image_size=(16, 24), pools=(3, 5)),
}
LABELS = ("cat", "dog", "traffic light", "bär")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_gives_what_was_put_in_and_is_given_back_byte_for_byte(name, tmp_path):
    listed = sections(NETWORKS[name])
    arrays, start = tensors(listed), header(0, 1, 0, seen=77)
    found = pretrained.load(write(tmp_path / "theirs", listed, start=start, names=LABELS))
    assert found.module == YOLOv3(CONFIGS[name])
    assert found.labels == LABELS and found.header == (0, 1, 0, 77)
    written = dict(table.write(names.table(found.module), found.params))
    assert list(written) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(written[key], array, err_msg=key)
    pretrained.save(tmp_path / "ours", found.module, found.params, labels=found.labels, header=found.header)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "yolov3.cfg",
        "yolov3.names",
        "yolov3.weights",
    ]
    assert (tmp_path / "ours" / "yolov3.weights").read_bytes() == weights(arrays, start)
    again = pretrained.load(tmp_path / "ours")
    assert (again.module, again.labels, again.header) == (found.module, found.labels, found.header)
    assert_equal(again.params, found.params)


def test_every_tensor_has_its_place(tmp_path):
    """Path by path for one layer of each kind; the shapes alone would let scale, bias and moments change places."""
    listed = sections(NETWORKS["yolov3"])
    arrays = tensors(listed)
    leaves = tree.flatten(pretrained.load(write(tmp_path, listed, arrays)).params)
    for path, number in (("stem", 0), ("stage1/block0/conv2", 3), ("neck1/conv5", 13), ("lateral2", 18), ("head2", 26)):
        for ours, theirs in {
            "bias": "biases",
            "scale": "scales",
            "mean": "rolling_mean",
            "var": "rolling_variance",
        }.items():
            np.testing.assert_array_equal(leaves[f"{path}/norm/{ours}"], arrays[f"{number}.{theirs}"])
        np.testing.assert_array_equal(leaves[f"{path}/conv/kernel"], arrays[f"{number}.weights"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(leaves["predict1/bias"], arrays["15.biases"])
    np.testing.assert_array_equal(leaves["predict1/kernel"], arrays["15.weights"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize("preset", [yolov3.yolov3, yolov3.yolov3_spp, yolov3.yolov3_tiny])
def test_the_cfg_of_a_preset_builds_the_preset(preset):
    module = YOLOv3(preset(7))
    text = darknet.cfg_text([section for section, _ in names.sections(module.cfg)])
    listed = [[kind, dict(options)] for kind, options in darknet.sections(text, "net.cfg")]
    assert names.module(Fields({"sections": listed}, "net.cfg")) == module
    count = {"yolov3": 108, "yolov3_spp": 115, "yolov3_tiny": 25}[preset.__name__]  # sections of the published files
    assert len(listed) == count


# (network, number of the section, change, what the message must name)
OTHER = [
    ("yolov3", 1, {"activation": "mish"}, "activation 'mish'; YOLOv3 of these widths has 'leaky'"),
    ("yolov3", 3, {"filters": "6"}, "layer 2 [convolutional] has filters 6; YOLOv3 of these widths has 4"),
    ("yolov3", 3, {"pad": "0", "size": "3"}, "layer 2 [convolutional] has size 3"),
    ("yolov3", 5, {"activation": "leaky"}, "layer 4 [shortcut] has activation 'leaky'"),
    ("yolov3", 5, {"from": "-2"}, "layer 4 [shortcut] has from [2]; YOLOv3 of these widths has [1]"),
    ("yolov3", 16, {"filters": "17"}, "layer 15 [convolutional] has filters 17; YOLOv3 of these widths has 18"),
    ("yolov3", 16, {"batch_normalize": "1"}, "layer 15 [convolutional] has batch_normalize 1"),
    ("yolov3", 17, {"scale_x_y": "1.05"}, "layer 16 [yolo] has scale_x_y 1.05"),
    ("yolov3", 29, {"classes": "5"}, "layer 28 [yolo] has classes 5"),
    ("yolov3", 18, {"layers": "-5"}, "layer 17 [route] has layers [12]"),
    ("yolov3", 21, {"groups": "2"}, "layer 20 [route] has groups 2"),
    ("yolov3-tiny", 6, {"stride": "2"}, "layer 5 [maxpool] has stride 2"),
    ("yolov3-tiny", 6, {"padding": "0"}, "layer 5 [maxpool] has padding 0"),
    ("yolov3-tiny", 9, {"batch_normalize": "0"}, "layer 8 [convolutional] has batch_normalize 0"),
    ("yolov3", 0, {"width": "26"}, "multiples of 4, not 16 × 26"),
    ("yolov3", 0, {"width": "60000", "height": "60000"}, "too large"),
    ("yolov3", 17, {"anchors": "0,3, 4,3, 0,5, 8,12"}, "anchors must be above 0"),
    ("yolov3", 17, {"iou_tresh": "0.2"}, "layer 16 [yolo] has the unknown option 'iou_tresh'"),
    ("yolov3-tiny", 2, None, "layer 1 [convolutional] is neither YOLOv3's nor YOLOv3-tiny's"),
    ("yolov3", 5, None, "layer 4 [convolutional] halves the image, and no [shortcut] is in the stage before it"),
    ("yolov3", 9, None, "depths must be at least 1, not (1, 0)"),
    ("yolov3", 29, None, "layer 17 [route] comes after YOLOv3's last [yolo]"),
    ("yolov3", 17, None, "layer 9 [convolutional] has filters 8; YOLOv3 of these widths has 4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "change", "word"), OTHER, ids=range(len(OTHER)))
def test_what_is_not_yolov3_is_refused_with_the_section_named(name, number, change, word, tmp_path):
    listed = copy.deepcopy(sections(NETWORKS[name]))
    arrays = tensors(listed)
    if change is None:
        del listed[number]
    else:
        listed[number][1].update(change)
    folder = write(tmp_path, listed, arrays)
    with pytest.raises(CheckpointError) as caught:
        config = [
            [kind, dict(options)] for kind, options in darknet.sections((folder / "net.cfg").read_text(), "net.cfg")
        ]
        fields = Fields({"model_type": "yolov3", "sections": config}, "net.cfg")
        pretrained.families.build(fields)
    assert word in str(caught.value)
    with pytest.raises(CheckpointError):
        pretrained.load(folder)


def test_a_network_of_other_layers_is_refused(tmp_path):
    listed = [*sections(NETWORKS["yolov3"]), ["upsample", {"stride": "2"}]]
    with pytest.raises(CheckpointError, match=r"layer 29 \[upsample\] comes after YOLOv3's last \[yolo\]"):
        pretrained.load(write(tmp_path / "more", listed, tensors(listed)))
    listed = sections("8.3 8.3/2 +")
    with pytest.raises(CheckpointError, match=r"lead to \[yolo\]"):
        names.module(Fields({"sections": listed[:3]}, "net.cfg"))


def test_an_unknown_option_may_be_ignored_by_name(tmp_path):
    listed = copy.deepcopy(sections(NETWORKS["yolov3"]))
    listed[17][1]["iou_tresh"] = "0.2"
    folder = write(tmp_path, listed)
    with pytest.raises(CheckpointError, match=r"yolo\.iou_tresh \(\"0\.2\"\) is unknown"):
        pretrained.load(folder)
    assert pretrained.load(folder / "net.cfg", ignore=["yolo.iou_tresh"]).module == YOLOv3(CONFIGS["yolov3"])


@pytest.mark.parametrize("lines", ["cat\ndog\n", "cat\n\ndog\nhorse\nsheep\n"])
def test_names_that_are_not_those_of_the_classes_are_refused(lines, tmp_path):
    folder = write(tmp_path, sections(NETWORKS["yolov3"]))
    (folder / "coco.names").write_text(lines)
    with pytest.raises(CheckpointError, match=r"coco\.names names \d classes, the cfg has 4"):
        pretrained.load(folder)


def test_what_darknet_cannot_hold_is_not_written(tmp_path):
    found = pretrained.load(write(tmp_path / "theirs", sections(NETWORKS["yolov3"])))
    module, params = found.module, found.params
    for more, word in (
        ({"dtype": "bfloat16"}, "float32"),
        ({"labels": ("a", "b")}, "2 labels for a model of 4 classes"),
        ({"labels": ("a", "b", "c\nd", "e")}, "cannot be a line"),
    ):
        with pytest.raises(CheckpointError, match=word):
            pretrained.save(tmp_path / "ours", module, params, **more)
        assert not (tmp_path / "ours").exists()
    other = module.clone(cfg=replace(module.cfg, norm_epsilon=1e-5))
    with pytest.raises(CheckpointError, match="norm_epsilon"):
        pretrained.save(tmp_path / "ours", other, params)


def test_half_precision_and_a_mesh_are_as_for_every_model(tmp_path):
    folder = write(tmp_path, sections(NETWORKS["yolov3"]))
    whole = pretrained.load(folder)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    half = pretrained.load(folder / "net.weights", dtype="bfloat16", mesh=mesh)
    running = tree.flatten(statistics.split(whole.params)[1])
    for path, leaf in tree.flatten(half.params).items():
        want = tree.flatten(whole.params)[path]
        np.testing.assert_array_equal(leaf, want if path in running else want.astype("bfloat16"), err_msg=path)
    kernel = half.params["stem"]["conv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 3, 4)
    shapes = pretrained.load(folder, shapes=True).params
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, whole.params)


def test_hub_convert_writes_darknets_files_again(tmp_path):
    listed = sections(NETWORKS["yolov3-tiny"])
    folder = write(tmp_path / "theirs", listed, names=LABELS)
    cfg = hub_convert.Config(source=folder, target=tmp_path / "ours")
    measured = hub_convert.run(cfg, tmp_path)
    assert measured["model"] == "YOLOv3" and measured["dtype"] == "float32"
    assert (tmp_path / "ours" / "yolov3.weights").read_bytes() == (folder / "net.weights").read_bytes()
