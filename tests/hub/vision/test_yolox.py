"""Folders of YOLOX without config.json, as its authors' files are; the general promises stand in test_families.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.files.weights import Spec
from fm_jax.models.vision import yolox
from tests.hub.forms import FORMS, assert_equal, build, draw, tensors

STEM = "backbone.backbone.stem.conv.conv.weight"


def folder(path, arrays, name="model.safetensors"):
    path.mkdir()
    save_file(arrays, path / name)
    return path


def test_a_folder_of_tensors_alone_is_opened_by_their_names(tmp_path):
    module, _ = build(FORMS["yolox-depthwise"])
    params = draw(module)
    arrays = tensors(module, params)
    counters = {name for name in arrays if name.endswith("running_var")}
    arrays |= {name.replace("running_var", "num_batches_tracked"): np.array(7) for name in counters}
    found = pretrained.load(folder(tmp_path / "weights", arrays))
    assert found.module == module and found.labels == ()
    assert_equal(found.params, params)


@pytest.mark.parametrize("size", ["nano", "s"])
def test_every_preset_is_known_by_its_tensors(size):
    module = yolox.YOLOX(getattr(yolox, f"yolox_{size}")())
    specs = table.specs(families.writing(module).table(module), families.abstract(module))
    assert families.build(families.described(SimpleNamespace(specs=specs, where="here")))[1] == module


def test_the_stem_reads_red_green_blue():
    """Their channels are pixel by pixel blue, green, red."""
    module, _ = build(FORMS["yolox"])
    params = draw(module)
    theirs, ours = tensors(module, params)[STEM], np.asarray(params["stem"]["conv"]["kernel"])
    for pixel in range(4):
        for channel in range(3):
            want = ours[:, :, 3 * pixel + 2 - channel].transpose(2, 0, 1)
            np.testing.assert_array_equal(theirs[:, 3 * pixel + channel], want)


def test_a_pickle_alone_is_refused_with_the_lines_that_convert_it(tmp_path):
    """Nothing of it is run."""
    trap = b"cos\nmkdir\n(S'" + str(tmp_path / "run").encode() + b"'\ntR."  # os.mkdir when it is unpickled
    (tmp_path / "yolox_s.pth").write_bytes(trap)
    with pytest.raises(CheckpointError, match=r"torch.load\('yolox_s.pth'.*weights_only=True.*safetensors.torch.save"):
        pretrained.load(tmp_path)
    assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_folders_without_config_are_refused(tmp_path):
    module, _ = build(FORMS["yolox"])
    arrays = tensors(module, draw(module))
    lost = {name: array for name, array in arrays.items() if name != "head.reg_preds.1.weight"}
    with pytest.raises(CheckpointError, match=r"head\.reg_preds\.1\.weight"):
        pretrained.load(folder(tmp_path / "lost", lost))
    with pytest.raises(CheckpointError, match="extra"):
        pretrained.load(folder(tmp_path / "more", {**arrays, "extra": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pretrained.load(folder(tmp_path / "foreign", {"weight": np.zeros(3, np.float32)}))
    odd = {**arrays, STEM: np.zeros((4, 13, 3, 3), np.float32)}
    with pytest.raises((CheckpointError, ConfigError), match="stem"):
        pretrained.load(folder(tmp_path / "odd", odd))


def test_the_shape_of_a_stem_is_what_counts():
    assert families.described(SimpleNamespace(specs={STEM: Spec("float32", (4, 12))}, where="here")) is None
